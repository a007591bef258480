"""VLM replicas: resident adapters, the requests that use them, deadlines, and expected failures as values. The engine
holds a fixed number of adapters: those of the resident releases, one that is being prepared, and one for late requests.
An adapter is unloaded only when its last request has ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve

from core import metrics
from core.artifacts import Artifacts
from core.errors import AdapterError, RatchetError
from core.ledger import Ledger
from core.priority import nice_process
from core.request_context import detached, note
from core.settings import Settings
from core.tracing import record
from serving.engines.vlm.generation import PROBE, GenerationRequest, GenerationResult, TokenChunk, merge_chunks
from serving.engines.vlm.open import VlmEngine
from serving.errors import EngineDead, InvalidRequest
from serving.messages import VLM_NICE, Refusal
from serving.ray.replica_process import begin_replica, freeze_gc
from serving.releases.residency import ResidencyRows, ResidencySource
from serving.releases.types import BASE, Prepared
from serving.replicas.adapter_cache import AdapterCache, AdapterFolders, adapters_path
from serving.replicas.follower import ResidencyFollower, check_start, wait_for_clip
from serving.replicas.forward_health import STALL_SECONDS, ForwardHealth

log = logging.getLogger("ratchet.vlm")
ROOM_SECONDS = 20.0
"""Longest wait of a new adapter for a place: long answers end by their deadline, which is about this."""
INCOMING, LATE = 1, 1
"""Places for adapters in addition to the resident ones: one that is being prepared, one for late requests."""
RETRY_SECONDS = 15.0
"""Pause after a failed start: Serve itself would retry at once, and load all cores without end."""
Result = TypeVar("Result")


class VlmWorker:
    """Answers under named adapters; loads missing ones on request. Use from one event loop."""

    def __init__(
        self,
        engine: VlmEngine,
        artifacts: AdapterFolders,
        replica: str,
        places: int,
        batch: int,
        deadline_seconds: float = STALL_SECONDS,
    ) -> None:
        """``places``: adapters that the engine holds at once. ``batch``: requests that it answers concurrently.
        ``deadline_seconds``: longest time of a request."""
        self.engine = engine
        self.artifacts = artifacts
        self.replica = replica
        self.places = places
        self.batch = batch
        self._loading = asyncio.Lock()
        self._keep: set[str] = set()
        self._coming: set[str] = set()
        self._leaving: set[str] = set()
        self._users: Counter[str] = Counter()
        self._freed = asyncio.Event()
        self._inside = 0
        self._prepared: dict[str | None, Prepared] = {}
        self._sweeps: set[asyncio.Task[None]] = set()
        self._health = ForwardHealth(max(STALL_SECONDS, deadline_seconds))

    async def prepare(self, vlm: str | None) -> Prepared:
        """Load the adapter next to what is served, and run golden inputs. The answer says what is wrong."""
        known = self._prepared.get(vlm)
        if known is not None and (vlm is None or self._is_ready(vlm)):
            return known
        if vlm is not None:
            self._coming.add(vlm)
        try:
            await self._ensure(vlm)
            await self.engine.golden(vlm)
        except EngineDead:
            raise
        except Exception as error:
            if vlm is not None:
                self._coming.discard(vlm)
                if vlm not in self._keep:
                    await self._sweep()
            return Prepared.failed(self.replica, vlm, error)
        self._prepared[vlm] = Prepared(self.replica, vlm)
        return self._prepared[vlm]

    async def adopt(self, vlms: Sequence[str | None]) -> str:
        """Make these adapters resident. Others stay until :meth:`retire`."""
        self._keep = {name for name in vlms if name is not None}
        self._coming -= self._keep
        return self.replica

    async def retire(self, vlms: Sequence[str | None]) -> list[str]:
        """Unload all but these: idle ones now, the others when their last request has ended."""
        await self.adopt(vlms)
        self._coming.clear()
        return await self._sweep()

    async def reply(
        self, request: GenerationRequest, adapter: str | None, seconds: float
    ) -> GenerationResult | Refusal:
        """The whole answer. ``seconds``: time left. Raises EngineDead."""
        answer = await self._answered("reply", lambda: self.engine.reply(request, adapter), adapter, seconds)
        if isinstance(answer, GenerationResult):
            metrics.vlm.tokens(answer.prompt_tokens, len(answer.tokens))
        return answer

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], adapter: str | None, seconds: float
    ) -> list[float] | Refusal:
        """Log-probability of each choice as the whole answer."""
        return await self._answered("score", lambda: self.engine.score(request, choices, adapter), adapter, seconds)

    async def probe(self, adapter: str | None, seconds: float) -> GenerationResult | Refusal:
        """Generate a short answer; ``busy``, without one, while requests are being answered and passes end."""
        self._health.passed(self.engine.passed_at)
        if self._inside and not self._health.stalled:
            return Refusal("busy", f"{self._inside} requests are being answered.")
        return await self.reply(PROBE, adapter, seconds)

    async def stream(
        self, request: GenerationRequest, adapter: str | None, seconds: float
    ) -> AsyncIterator[TokenChunk | Refusal]:
        """Chunks as they come, or a Refusal as the last item. Closing it aborts the request. Raises EngineDead."""
        began, last = time.perf_counter(), None
        with self._observed("stream", adapter) as ending:
            try:
                await self._ensure(adapter)
                source = self.engine.stream(request, adapter)
                async with aclosing(coalesce(source, began + seconds - time.perf_counter())) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        if last is None:
                            metrics.vlm.first_token(time.perf_counter() - began)
                        last = chunk
                        self._health.succeeded()
                        if chunk.finish:
                            ending.outcome = "ok"
                        yield chunk
            except EngineDead:
                raise
            except (TimeoutError, RatchetError) as error:
                yield ending.refused(error)
            finally:
                if last is not None:
                    metrics.vlm.tokens(last.prompt_tokens, last.completion_tokens)

    async def status(self) -> dict[str, Any]:
        return {
            "replica": self.replica, "engine": self.engine.kind, "precision": self.engine.precision,
            "base": self.engine.base.name,
            "resident": sorted(self.engine.resident()), "running": self.engine.running(),
            "waiting": max(0, self._inside - self.batch), "trouble": self.engine.last_error(),
        }  # fmt: skip

    async def check_health(self) -> None:
        """Raise RuntimeError when the engine is dead or answers fail repeatedly; request a short one now and then."""
        if last_error := self.engine.last_error():
            raise RuntimeError(f"the engine is dead: {last_error}")
        self._health.passed(self.engine.passed_at)
        await self._health.check(lambda: self.engine.reply(PROBE, None), busy=self._inside > 0)

    async def _answered(
        self, kind: str, work: Callable[[], Awaitable[Result]], adapter: str | None, seconds: float
    ) -> Result | Refusal:
        with self._observed(kind, adapter) as ending:
            try:
                if seconds <= 0:
                    raise TimeoutError
                async with asyncio.timeout(seconds):
                    await self._ensure(adapter)
                    answer = await work()
            except EngineDead:
                raise
            except (TimeoutError, RatchetError) as error:
                return ending.refused(error)
            ending.outcome = "ok"
            self._health.succeeded()
            return answer

    @contextmanager
    def _observed(self, kind: str, adapter: str | None) -> Iterator[_Ending]:
        """Count a request, its outcome and its adapter's users; the last user of an adapter that is not kept unloads
        it."""
        note(adapter or BASE)
        began, ending = time.monotonic(), _Ending()
        self._count(adapter, +1)
        try:
            yield ending
        except EngineDead:
            ending.outcome = "dead"
            raise
        except Exception as error:
            self._health.failed(error)
            raise
        finally:
            self._count(adapter, -1)
            if adapter is not None and not self._users[adapter]:
                del self._users[adapter]
                self._freed.set()
                if self._keep and not self._is_kept(adapter):
                    task = asyncio.get_running_loop().create_task(self._sweep_later(), context=detached())
                    self._sweeps.add(task)
                    task.add_done_callback(self._sweeps.discard)
            ended = time.monotonic()
            record("engine", began, ended)
            metrics.vlm.ended(kind, ending.outcome, ended - began)

    def _count(self, adapter: str | None, change: int) -> None:
        self._inside += change
        if adapter is not None:
            self._users[adapter] += change
        metrics.vlm.inside(min(self._inside, self.batch), max(0, self._inside - self.batch))

    def _is_kept(self, adapter: str) -> bool:
        return adapter in self._keep or adapter in self._coming

    def _is_ready(self, adapter: str) -> bool:
        return adapter in self.engine.resident() and adapter not in self._leaving

    def _idle(self) -> list[str]:
        return [name for name in self.engine.resident() if not self._is_kept(name) and not self._users[name]]

    async def _ensure(self, adapter: str | None) -> None:
        if adapter is None or self._is_ready(adapter):
            return
        async with self._loading:
            if self._is_ready(adapter):
                return
            await self._make_room()
            directory = await asyncio.to_thread(self.artifacts.fetch, f"adapters/{adapter}")
            await self.engine.load(adapter, directory)

    async def _make_room(self) -> None:
        end = time.monotonic() + ROOM_SECONDS
        while len(self.engine.resident()) >= self.places:
            if idle := self._idle():
                await self._drop(idle[0])
                continue
            self._freed.clear()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._freed.wait()
            except TimeoutError:
                raise AdapterError(
                    f"all {self.places} places for adapters are in use.", "Try again when long answers have ended."
                ) from None

    async def _sweep(self) -> list[str]:
        async with self._loading:
            idle = self._idle()
            for name in idle:
                await self._drop(name)
        return idle

    async def _sweep_later(self) -> None:
        with suppress(RatchetError):  # a dead engine: check_health says so
            await self._sweep()

    async def _drop(self, adapter: str) -> None:
        """Call with the lock held."""
        self._prepared.pop(adapter, None)
        self._leaving.add(adapter)
        try:
            await self.engine.unload(adapter)
        finally:
            self._leaving.discard(adapter)


@dataclass
class _Ending:
    """Outcome of a request for the metrics. ``gone``: its client left."""

    outcome: str = "gone"

    def refused(self, error: TimeoutError | RatchetError) -> Refusal:
        refusal = Refusal("late", "the deadline passed before the answer was ready.", "Ask for fewer tokens, or later.")
        if isinstance(error, RatchetError):
            refusal = Refusal("adapter", error.message, error.fix)
        if isinstance(error, InvalidRequest):
            refusal = Refusal("ask", error.message, error.fix, error.param)
        self.outcome = refusal.code
        return refusal


async def coalesce(source: AsyncIterator[TokenChunk], seconds: float) -> AsyncIterator[TokenChunk]:
    """Merge chunks that arrived since the last read, so that a slow reader gets few messages. Closing this closes the
    source. Raises TimeoutError when the source did not end within ``seconds``."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    ready: list[TokenChunk] = []
    news = asyncio.Event()

    async def pump() -> None:
        try:
            async for chunk in source:
                ready.append(chunk)
                news.set()
        finally:
            news.set()

    task = loop.create_task(pump())
    try:
        while True:
            async with asyncio.timeout_at(end):
                await news.wait()
            news.clear()
            if ready:
                now, ready[:] = merge_chunks(ready), []
                yield now
            elif task.done():
                task.result()
                return
            if task.done():
                news.set()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


class VlmReplica(VlmWorker):
    """The deployment: one engine, and the adapters of the resident releases. Starts as an encoder does, after CLIP. A
    dead engine cannot be restarted in its process: the replica reports it, and Serve starts another one. Failed starts
    are repeated without end, see :data:`serving.ray.ray_session.START_ATTEMPTS`."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        nice_process(VLM_NICE)
        begin_replica(settings, "vlm")
        await wait_for_clip()
        try:
            await self._start(settings)
        except Exception:
            log.exception("the VLM cannot start")
            await asyncio.sleep(RETRY_SECONDS)
            raise
        freeze_gc()

    async def _start(self, settings: Settings) -> None:
        from serving.engines.vlm.open import open_engine  # sets what vLLM reads at import
        from serving.engines.vlm.vlm_base import load_vlm_base

        ledger = Ledger.lazy(settings.ledger)
        self._adapters = AdapterCache(Artifacts(settings.artifacts), adapters_path(settings.home), ledger)
        source = ResidencySource.of(settings, ledger, "vlm", self._adapters.digests)
        engine = open_engine(load_vlm_base(settings.home, settings.base.vlm), settings.serve)
        await engine.start()
        super().__init__(
            engine, self._adapters, serve.get_replica_context().replica_tag,
            settings.serve.rollback_window + INCOMING + LATE, settings.serve.vlm_batch, settings.serve.deadline_seconds,
        )  # fmt: skip
        self._follower = ResidencyFollower("vlm", source.read, self._load, source.keep)
        try:
            rows = await asyncio.to_thread(source.newest)
            self._adapters.expect(source.adapters)
            wanted = rows.vlms or (None,)
            await self.adopt(wanted)
            check_start([await self.prepare(vlm) for vlm in wanted], rows.needed("vlm"))
        except Exception:
            await engine.close()
            raise

    async def __del__(self) -> None:
        """Serve awaits this when the replica ends: the engine's processes end with it."""
        if (engine := getattr(self, "engine", None)) is not None:  # it may have failed to start
            await engine.close()

    async def adopt(self, vlms: Sequence[str | None]) -> str:
        """The controller has committed these adapters as resident, the live one first."""
        self._follower.mark_in_step()
        return await super().adopt(vlms)

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Also raises when the replica lags behind."""
        await super().check_health()
        await self._follower.check()

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        self._adapters.protect([*rows.clips, *rows.vlms])
        prepared = [await self.prepare(vlm) for vlm in rows.needed("vlm")]
        if not any(each.error for each in prepared):
            await self.adopt(rows.vlms or (None,))
        return prepared
