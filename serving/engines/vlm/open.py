"""Opens VLM engines, for async code and for synchronous code (the gate, scripts, tests)."""

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
"""Concurrent requests in the engine: enough to fill its batches, few enough to stop soon after an error."""


class VlmEngine(Protocol):
    """One base and its resident adapters. Use from one event loop."""

    base: VlmBase
    kind: Literal["vllm", "transformers"]

    @property
    def precision(self) -> str:
        """Data type of the running weights, by torch's name; known after :meth:`start`."""

    @property
    def passed_at(self) -> float:
        """Monotonic time at which a forward pass last ended; 0 if none has."""

    async def start(self) -> None:
        """Load the base (seconds to a minute) and find out which of its parts take adapters."""

    async def load(self, name: str, directory: Path) -> None:
        """Make an adapter resident; loading again changes nothing. Raises AdapterError, and keeps what was resident."""

    async def unload(self, name: str) -> None:
        """Forget an adapter after its last request. Unknown names are ignored."""

    def resident(self) -> frozenset[str]:
        """Names that requests may use."""

    def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        """Answer in chunks under a resident adapter (None: the base). Closing the iterator aborts the request. Raises
        InvalidRequest, AdapterError (not resident), EngineDead."""

    async def reply(self, request: GenerationRequest, adapter: str | None) -> GenerationResult:
        """The whole answer. Cancelling aborts the request."""

    async def score(self, request: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        """Log-probability of each choice as the whole answer, its end included."""

    async def golden(self, adapter: str | None) -> str:
        """Answer fixed inputs and return a fingerprint. Raises AdapterError when a log-probability is not finite."""

    def running(self) -> int:
        """Number of running requests."""

    def last_error(self) -> str:
        """Reason why the engine is dead; empty while it runs."""

    async def close(self) -> None:
        """Stop the engine and every process that it started."""


def open_engine(base: VlmBase, serve: Serve, *, kind: str | None = None) -> VlmEngine:
    """The engine of ``kind`` or ``serve.vlm_engine``, not started; ``auto``: vLLM if installed. Raises ConfigError."""
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
    """Runs an engine in its own event loop and thread. Entering starts the engine, leaving closes it."""

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
        """Answers in the order of ``asks``. ``label``: text of the progress bar; no bar if empty."""
        return self._all(lambda request: self.engine.reply(request, adapter), asks, label)

    def scores(
        self, asks: Sequence[GenerationRequest], choices: Sequence[Sequence[str]], adapter: str | None, label: str = ""
    ) -> list[list[float]]:
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
