"""Opens VLM engines: for code that awaits, and for code that does not (the gate, scripts, tests).

>>> with SyncVlm(open_engine(base, settings.serve)) as vlm:
...     vlm.load("vlm-0123456789ab", directory)
...     replies = vlm.replies(asks, "vlm-0123456789ab", label="candidate")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, TypeVar

from core.errors import ConfigError
from core.progress import track
from core.settings.serving import Serve
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.engines.vlm.vllm_start import installed
from serving.engines.vlm.vlm_base import VlmBase

T = TypeVar("T")
AHEAD: Final = 64
"""Requests inside the engine at once: enough to fill its batches, few enough to stop soon after an error."""


class VlmEngine(Protocol):
    """One base and its resident adapters. Used from one event loop."""

    base: VlmBase
    kind: Literal["vllm", "transformers"]

    @property
    def precision(self) -> str:
        """Data type of the weights that run, as torch names it; known after :meth:`start`."""

    @property
    def passed_at(self) -> float:
        """When the last forward pass is known to have ended, on the monotonic clock; 0: none has."""

    async def start(self) -> None:
        """Load the base (seconds to a minute), and find out which parts of it take adapters."""

    async def load(self, name: str, directory: Path) -> None:
        """Make an adapter resident; twice is once. Raises AdapterError; what was resident stays, and is served on."""

    async def unload(self, name: str) -> None:
        """Forget an adapter when its last request has ended. An unknown name is nothing."""

    def resident(self) -> frozenset[str]:
        """Names that requests may use."""

    def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        """Answer chunk by chunk under a resident adapter (None: the base). Closing the iterator aborts the request.

        Raises InvalidRequest, AdapterError (not resident), EngineDead.
        """

    async def reply(self, request: GenerationRequest, adapter: str | None) -> GenerationResult:
        """The whole answer. Cancelling aborts the request."""

    async def score(self, request: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        """Log-probability of each choice as the whole answer (its end included) after the prompt."""

    async def golden(self, adapter: str | None) -> str:
        """Answer fixed inputs: raises AdapterError when a log-probability is not finite; else a short fingerprint."""

    def running(self) -> int:
        """Requests inside."""

    def last_error(self) -> str:
        """Why the engine is dead; empty while it lives."""

    async def close(self) -> None:
        """End it, and every process it started."""


def open_engine(base: VlmBase, serve: Serve, *, kind: str | None = None) -> VlmEngine:
    """The engine that ``kind`` or ``serve.vlm_engine`` names, not started. ``auto``: vLLM where it is installed.

    Raises :class:`ConfigError` for an unknown kind.
    """
    wanted = kind or serve.vlm_engine
    if wanted == "auto":
        wanted = "vllm" if installed() else "transformers"
    if wanted == "vllm":
        from serving.engines.vlm.vllm_engine import VllmEngine

        return VllmEngine(base, serve)
    if wanted == "transformers":
        from serving.engines.vlm.hf_engine import TransformersEngine  # transformers takes seconds to import

        return TransformersEngine(base, serve)
    raise ConfigError(f"There is no VLM engine {wanted!r}.", "Set serve.vlm_engine to auto, vllm or transformers.")


class SyncVlm:
    """Runs an engine in an event loop of its own, in a thread. Entering starts the engine, leaving closes it."""

    def __init__(self, engine: VlmEngine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vlm-loop", daemon=True)

    def __enter__(self) -> SyncVlm:
        self._thread.start()
        try:
            self._do(self.engine.start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._do(self.engine.close())
        finally:
            self._end()

    def load(self, name: str, directory: Path) -> None:
        self._do(self.engine.load(name, directory))

    def unload(self, name: str) -> None:
        self._do(self.engine.unload(name))

    def golden(self, adapter: str | None) -> str:
        return self._do(self.engine.golden(adapter))

    def replies(
        self, asks: Sequence[GenerationRequest], adapter: str | None, label: str = ""
    ) -> list[GenerationResult]:
        """An answer to each, in order. ``label``: what the progress bar says; none when empty."""
        return self._all(lambda request: self.engine.reply(request, adapter), asks, label)

    def scores(
        self, asks: Sequence[GenerationRequest], choices: Sequence[Sequence[str]], adapter: str | None, label: str = ""
    ) -> list[list[float]]:
        """Log-probabilities of each ask's own choices, in order."""
        pairs = list(zip(asks, choices, strict=True))
        return self._all(lambda pair: self.engine.score(pair[0], pair[1], adapter), pairs, label)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _all(self, call: Callable[[Any], Awaitable[T]], items: Sequence[Any], label: str) -> list[T]:
        tasks = self._do(self._begin(call, items))
        results = (self._do(_result(task)) for task in tasks)
        try:
            return list(track(results, label, total=len(tasks)) if label else results)
        finally:
            for task in tasks:
                self._loop.call_soon_threadsafe(task.cancel)

    async def _begin(self, call: Callable[[Any], Awaitable[T]], items: Sequence[Any]) -> list[asyncio.Task[T]]:
        gate = asyncio.Semaphore(AHEAD)

        async def one(item: Any) -> T:
            async with gate:
                return await call(item)

        return [asyncio.create_task(one(item)) for item in items]

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _result(task: asyncio.Task[T]) -> T:
    return await task
