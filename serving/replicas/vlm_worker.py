"""One VLM replica's work, free of Ray: resident adapters, who uses them, deadlines, and refusals as values.

The engine has a fixed number of places for adapters. The ones of the resident releases keep theirs; another place is
for one that is being prepared, and one for what a late request still needs. An adapter is never taken from under a
request: it goes when its last one has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from core import metrics
from core.errors import AdapterError, RatchetError
from core.request_context import detached
from serving.engines.vlm.generation import PROBE, GenerationRequest, GenerationResult, TokenChunk, VlmEngine
from serving.errors import EngineDead, InvalidRequest
from serving.messages import Refusal
from serving.releases.types import Prepared, cause_of
from serving.replicas.adapter_cache import AdapterFolders
from serving.replicas.forward_health import STALL_SECONDS, ForwardHealth
from serving.replicas.stream_coalescing import coalesce

ROOM_SECONDS = 20.0
"""How long a new adapter waits for a place. Long answers end by their deadline, which is about this."""
Result = TypeVar("Result")


class VlmWorker:
    """Answers under named adapters; loads one that is asked for and not resident. Use from one event loop."""

    def __init__(
        self,
        engine: VlmEngine,
        artifacts: AdapterFolders,
        replica: str,
        places: int,
        batch: int,
        deadline_seconds: float = STALL_SECONDS,
    ) -> None:
        """Args:
        places: adapters that the engine holds at once.
        batch: requests that it answers side by side.
        deadline_seconds: after which no request is answered any more.
        """
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

    async def prepare(self, adapter: str | None) -> Prepared:
        """Hold the adapter beside what is served, and answer golden inputs with it. The answer says what is wrong."""
        known = self._prepared.get(adapter)
        if known is not None and (adapter is None or self._is_ready(adapter)):
            return known
        if adapter is not None:
            self._coming.add(adapter)
        try:
            await self._ensure(adapter)
            await self.engine.golden(adapter)
        except EngineDead:
            raise
        except Exception as error:
            await self._give_up(adapter)
            reason = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"[:500]
            return Prepared(self.replica, adapter, error=reason, cause=cause_of(error))
        self._prepared[adapter] = Prepared(self.replica, adapter)
        return self._prepared[adapter]

    def adopt(self, adapters: Sequence[str | None]) -> str:
        """These adapters are resident from now on. Others stay until :meth:`retire`."""
        self._keep = {name for name in adapters if name is not None}
        self._coming -= self._keep
        return self.replica

    async def retire(self, adapters: Sequence[str | None]) -> list[str]:
        """Unload all but these: idle ones now, the others when their last request has ended."""
        self.adopt(adapters)
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

    async def probe(self, adapter: str | None, seconds: float) -> GenerationResult | Refusal:
        """A short answer. While requests are answered, and passes end, none is needed: then the code is ``busy``."""
        self._health.passed(self.engine.passed_at)
        if self._inside and not self._health.stalled:
            return Refusal("busy", f"{self._inside} requests are being answered.")
        return await self.reply(PROBE, adapter, seconds)

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], adapter: str | None, seconds: float
    ) -> list[float] | Refusal:
        """Log-probability of each choice as the whole answer."""
        return await self._answered("score", lambda: self.engine.score(request, choices, adapter), adapter, seconds)

    async def stream(
        self, request: GenerationRequest, adapter: str | None, seconds: float
    ) -> AsyncIterator[TokenChunk | Refusal]:
        """Chunks as they come, or why there are none (any more). Closing it aborts the request. Raises EngineDead."""
        began, last = time.perf_counter(), None
        outcome = "gone"
        try:
            with self._counted(adapter):
                await self._ensure(adapter)
                source = self.engine.stream(request, adapter)
                async with aclosing(coalesce(source, began + seconds - time.perf_counter())) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        if last is None:
                            metrics.vlm.first_token(time.perf_counter() - began)
                        last = chunk
                        self._health.succeeded()
                        if chunk.finish:
                            outcome = "ok"
                        yield chunk
        except EngineDead:
            outcome = "dead"
            raise
        except (TimeoutError, RatchetError) as error:
            refusal = refused(error)
            outcome = refusal.code
            yield refusal
        except Exception as error:
            self._health.failed(error)
            raise
        finally:
            metrics.vlm.ended("stream", outcome, time.perf_counter() - began)
            if last is not None:
                metrics.vlm.tokens(last.prompt_tokens, last.completion_tokens)

    async def check_health(self) -> None:
        """Raise RuntimeError when answers fail again and again; ask for a short one now and then."""
        self._health.passed(self.engine.passed_at)
        await self._health.check(lambda: self.engine.reply(PROBE, None), busy=self._inside > 0)

    def status(self) -> dict[str, Any]:
        """What an operator wants to know of this replica."""
        return {
            "replica": self.replica, "engine": self.engine.kind, "precision": self.engine.precision,
            "base": self.engine.base.name,
            "resident": sorted(self.engine.resident()), "running": self.engine.running(),
            "waiting": max(0, self._inside - self.batch), "trouble": self.engine.last_error(),
        }  # fmt: skip

    async def _answered(
        self, kind: str, work: Callable[[], Awaitable[Result]], adapter: str | None, seconds: float
    ) -> Result | Refusal:
        began, outcome = time.perf_counter(), "gone"
        try:
            if seconds <= 0:
                raise TimeoutError
            with self._counted(adapter):
                async with asyncio.timeout(seconds):
                    await self._ensure(adapter)
                    answer = await work()
            outcome = "ok"
            self._health.succeeded()
            return answer
        except EngineDead:
            outcome = "dead"
            raise
        except (TimeoutError, RatchetError) as error:
            refusal = refused(error)
            outcome = refusal.code
            return refusal
        except Exception as error:
            self._health.failed(error)
            raise
        finally:
            metrics.vlm.ended(kind, outcome, time.perf_counter() - began)

    @contextmanager
    def _counted(self, adapter: str | None) -> Iterator[None]:
        """Count a request and the user of an adapter. The last user of one that is not kept lets it go."""
        self._count(+1)
        if adapter is not None:
            self._users[adapter] += 1
        try:
            yield
        finally:
            self._count(-1)
            if adapter is not None:
                self._users[adapter] -= 1
                if not self._users[adapter]:
                    del self._users[adapter]
                    self._freed.set()
                    if self._keep and not self._is_kept(adapter):
                        task = asyncio.get_running_loop().create_task(self._sweep_later(), context=detached())
                        self._sweeps.add(task)
                        task.add_done_callback(self._sweeps.discard)

    def _count(self, change: int) -> None:
        self._inside += change
        metrics.vlm.inside(min(self._inside, self.batch), max(0, self._inside - self.batch))

    def _is_kept(self, adapter: str) -> bool:
        return adapter in self._keep or adapter in self._coming

    def _is_ready(self, adapter: str) -> bool:
        return adapter in self.engine.resident() and adapter not in self._leaving

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
            idle = [name for name in self.engine.resident() if not self._is_kept(name) and not self._users[name]]
            if idle:
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

    async def _give_up(self, adapter: str | None) -> None:
        """What could not be prepared is unloaded, unless it is served."""
        if adapter is None:
            return
        self._coming.discard(adapter)
        if adapter not in self._keep:
            await self._sweep()

    async def _sweep(self) -> list[str]:
        async with self._loading:
            gone = [name for name in self.engine.resident() if not self._is_kept(name) and not self._users[name]]
            for name in gone:
                await self._drop(name)
        return gone

    async def _sweep_later(self) -> None:
        try:
            await self._sweep()
        except RatchetError:
            return  # a dead engine: check_health says so

    async def _drop(self, adapter: str) -> None:
        """Call with the lock held."""
        self._prepared.pop(adapter, None)
        self._leaving.add(adapter)
        try:
            await self.engine.unload(adapter)
        finally:
            self._leaving.discard(adapter)


def refused(error: TimeoutError | RatchetError) -> Refusal:
    """An expected failure as a value."""
    if isinstance(error, InvalidRequest):
        return Refusal("ask", error.message, error.fix)
    if isinstance(error, RatchetError):
        return Refusal("adapter", error.message, error.fix)
    return Refusal("late", "the deadline passed before the answer was ready.", "Ask for fewer tokens, or later.")
