"""The VLM engine on transformers alone: for machines without vLLM, and as the baseline for vLLM. The base is
held once; an adapter is a shell around it with its merged weights (:mod:`layers`). Waiting requests for one adapter are
answered as one batch in a thread; other requests wait until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from core.errors import RatchetError
from core.settings.serving import Serve
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from serving.engines.vlm.adapters import (
    BASE,
    Residents,
    Shapes,
    fingerprint,
    golden_requests,
    linear_shapes,
    read_validated_adapter,
)
from serving.engines.vlm.generation import Detokenizer, Finish, GenerationRequest, GenerationResult, TokenChunk, whole
from serving.engines.vlm.hf_worker import BatchRow, Worker
from serving.engines.vlm.prompts import answer_tokens, check_length, end_token, inputs
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest

T = TypeVar("T")


class TransformersEngine:
    kind: Literal["vllm", "transformers"] = "transformers"
    precision = "float32"

    def __init__(self, base: VlmBase, serve: Serve) -> None:
        self.base = base
        self._serve = serve
        self._residents: Residents[nn.Module] = Residents(serve.rollback_window + 3)
        self._model: nn.Module = nn.Identity()
        self._processor: Any = None
        self._reading = threading.Lock()
        self._shapes: Shapes = {}
        self._worker: Worker | None = None

    async def start(self) -> None:
        """Load the base, on a GPU if there is one, and start the answering thread."""
        await asyncio.to_thread(self._load_base)

        async def base() -> nn.Module:
            return self._model

        await self._residents.add(BASE, base)

    def _load_base(self) -> None:
        from transformers import GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._processor = self.base.processor()
        self._shapes = linear_shapes(self.base)
        model: Any = self.base.build_model().to("cuda" if torch.cuda.is_available() else "cpu")
        configured = model.generation_config.eos_token_id
        own = configured if isinstance(configured, list) else [configured]
        ends = frozenset({end_token(self._processor), *(int(token) for token in own if token is not None)})
        # The checkpoint's own penalties and temperatures must not change answers.
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(ends), pad_token_id=self._processor.tokenizer.pad_token_id
        )
        self._model = model
        # A separate processor: fast tokenizers cannot be used by two threads at once.
        self._worker = Worker(self.base.processor(), ends, self._serve.vlm_batch, self._serve.vlm_threads)

    async def load(self, name: str, directory: Path) -> None:
        self._working()

        def merged() -> nn.Module:
            files = read_validated_adapter(self.base, self._shapes, name, directory, self._serve.vlm_max_rank)
            return shell_of(self._model, effective_weights(files, self._model))

        await self._residents.add(name, lambda: asyncio.to_thread(merged))

    async def unload(self, name: str) -> None:
        await self._residents.remove(name)

    def resident(self) -> frozenset[str]:
        return self._residents.names()

    async def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncGenerator[TokenChunk]:
        worker = self._working()
        with self._residents.using(adapter) as model:
            length = await asyncio.to_thread(self._length, request)
            events: asyncio.Queue[tuple[int, float, Finish] | RatchetError] = asyncio.Queue()
            most = min(request.max_tokens, self._serve.vlm_context - length)
            row = BatchRow(request, most, _poster(events.put_nowait))
            detokenizer = Detokenizer(self._processor.tokenizer, request.stop)
            done = 0
            worker.put(model, row)
            try:
                while True:
                    item = await events.get()
                    if isinstance(item, RatchetError):
                        raise item
                    token, logprob, finish = item
                    done += 1
                    text = detokenizer.take((token,), bool(finish))
                    finish = "stop" if detokenizer.stopped else finish
                    yield TokenChunk(text, (token,), (logprob,), length, done, finish)
                    if finish:
                        return
            finally:
                row.aborted = True
                worker.discard(row)

    async def reply(self, request: GenerationRequest, adapter: str | None) -> GenerationResult:
        chunks = self.stream(request, adapter)
        async with contextlib.aclosing(chunks):
            return await whole(chunks)

    async def score(self, request: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        worker = self._working()
        with self._residents.using(adapter) as model:
            await asyncio.to_thread(self._length, request, choices)
            return await worker.score(model, request, choices)

    async def golden(self, adapter: str | None) -> str:
        return fingerprint(adapter, [await self.reply(request, adapter) for request in golden_requests()])

    def running(self) -> int:
        return self._residents.running()

    @property
    def passed_at(self) -> float:
        return 0.0 if self._worker is None else self._worker.passed_at

    def last_error(self) -> str:
        return "The engine was not started." if self._worker is None else self._worker.last_error

    async def close(self) -> None:
        """Stop the thread after its current token."""
        if self._worker is not None:
            self._worker.stop("The engine was closed.")
            await asyncio.to_thread(self._worker.join)

    def _working(self) -> Worker:
        if self._worker is None or self._worker.last_error:
            raise EngineDead(self.last_error())
        return self._worker

    def _length(self, request: GenerationRequest, choices: Sequence[str] = ()) -> int:
        """Tokens of the prompt. Raises :class:`InvalidRequest` when it, or a choice after it, does not fit."""
        with self._reading:
            try:
                prompt = int(inputs(self._processor, [request])["input_ids"].shape[1])
                longest = max((len(answer_tokens(self._processor, choice)) for choice in choices), default=0)
            except RatchetError:
                raise
            except Exception as error:  # templates, tokenizers and image processors raise anything
                raise InvalidRequest(
                    f"The request cannot be read: {error}", "Change the messages or the image."
                ) from error
        check_length(prompt + longest, self._serve.vlm_context)
        return prompt


def _poster(receive: Callable[[T], None]) -> Callable[[T], None]:
    """Wrap ``receive`` for other threads: runs in this event loop, or is ignored once that is closed."""
    loop = asyncio.get_running_loop()

    def post(item: T) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(receive, item)

    return post
