"""The VLM engine on transformers alone: for machines without vLLM, and as the baseline for vLLM. An adapter is a shell
around the base with its merged weights (:mod:`layers`). Waiting requests for one adapter are answered as one batch in a
thread; others wait until it ends. A failed batch continues in halves, down to single rows. When a single row fails, a
known good request shows whether the row or the engine is at fault; only that one ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from core.errors import AdapterError, RatchetError
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
from serving.engines.vlm.generation import (
    PROBE,
    Detokenizer,
    Finish,
    GenerationRequest,
    GenerationResult,
    TokenChunk,
    whole,
)
from serving.engines.vlm.prompts import answer_tokens, check_length, end_token, inputs
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest

T = TypeVar("T")
log = logging.getLogger("ratchet.vlm")


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
        if request.json_schema:
            raise InvalidRequest(
                "response_format: the engine transformers cannot make answers follow a JSON schema.",
                "Leave it out, or ask an operator to set serve.vlm_engine to vllm.", "response_format",
            )  # fmt: skip
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


@dataclass(eq=False)
class BatchRow:
    """One request of a batch. ``tell`` receives each token with its log-probability and, at the end, the finish reason;
    or an error. After a failed batch a row continues in another one, behind the tokens it has."""

    request: GenerationRequest
    most: int
    tell: Callable[[tuple[int, float, Finish] | RatchetError], None]
    aborted: bool = False
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    chance: torch.Generator | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.request.temperature > 0:
            self.chance = torch.Generator()
            if self.request.seed is None:
                self.chance.seed()
            else:
                self.chance.manual_seed(self.request.seed)

    def choose(self, logprobs: torch.Tensor) -> int:
        """Choose the next token from log-probabilities [vocabulary]. Raises :class:`AdapterError` if not finite."""
        if not math.isfinite(float(logprobs.max())):
            raise AdapterError(
                "The model gives log-probabilities that are not finite.", "Do not release it; look at the training run."
            )
        if self.chance is None:
            return int(logprobs.argmax())
        chances = (logprobs / self.request.temperature).softmax(0)
        if self.request.top_p < 1.0:
            ordered, order = chances.sort(descending=True)
            left_out = ordered.cumsum(0) - ordered >= self.request.top_p
            left_out[0] = False
            chances = torch.zeros_like(chances).scatter(0, order, ordered.masked_fill(left_out, 0.0))
        return int(torch.multinomial(chances, 1, generator=self.chance))

    def take(self, logprobs: torch.Tensor, ends: frozenset[int]) -> int:
        """Choose, report and count the next token; sets ``done`` at the end of the answer."""
        token = self.choose(logprobs)
        self.tokens.append(token)
        full = len(self.tokens) >= self.most
        finish: Finish = "stop" if token in ends else "length" if full else ""
        self.done = bool(finish)
        self.tell((token, float(logprobs[token]), finish))
        return token

    def end(self, error: Exception) -> None:
        """Fail this row alone; errors other than RatchetError are blamed on the request."""
        self.done = True
        self.tell(as_failure(error))


def as_failure(error: Exception) -> RatchetError:
    """The error of a request whose own computation failed while the engine works."""
    if isinstance(error, RatchetError):
        return error
    return InvalidRequest(
        f"The model cannot answer the request: {str(error)[:200] or type(error).__name__}.",
        "Change its parameters, messages or images.",
    )


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Forces ``generate`` to the token that each row chooses by its own parameters. A row that fails ends alone."""

    def __init__(self, rows: Sequence[BatchRow], ends: frozenset[int]) -> None:
        self._rows = rows
        self._ends = ends
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(-1).cpu()
        chosen = torch.zeros(len(self._rows), 1, dtype=torch.long)
        for i, row in enumerate(self._rows):
            row.done = row.done or row.aborted
            if row.done:
                continue
            if self._step < len(row.tokens):  # already reported by a batch that failed
                chosen[i] = row.tokens[self._step]
                continue
            try:
                chosen[i] = row.take(logprobs[i], self._ends)
            except Exception as error:
                row.end(error)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0.0)


class _Done(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, rows: Sequence[BatchRow], stopped: Callable[[], bool]) -> None:
        self._rows = rows
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        every = self._stopped()
        return torch.tensor([every or row.done or row.aborted for row in self._rows], device=input_ids.device)


@torch.inference_mode()
def answer(
    model: nn.Module, processor: Any, rows: Sequence[BatchRow], ends: frozenset[int], stopped: Callable[[], bool]
) -> None:
    """Generate for all ``rows`` at once (left padded, with a key-value cache) until each has ended, or ``stopped``."""
    batch = inputs(processor, [row.request for row in rows], next(model.parameters()).device)
    plan = GenerationConfig(max_new_tokens=max(row.most for row in rows), do_sample=False)
    model.generate(  # type: ignore[operator]
        **batch,
        generation_config=plan,
        logits_processor=[_Choice(rows, ends)],
        stopping_criteria=[_Done(rows, stopped)],
    )


@torch.inference_mode()
def score(model: nn.Module, processor: Any, request: GenerationRequest, choices: Sequence[str]) -> list[float]:
    """Log-probability of each choice with its end token after the prompt; right padded for plain positions."""
    device = next(model.parameters()).device
    prompt = inputs(processor, [request])
    start = prompt["input_ids"].shape[1]
    answers = [answer_tokens(processor, choice) for choice in choices]
    width = start + max(map(len, answers))
    pad = processor.tokenizer.pad_token_id or 0
    batch: dict[str, torch.Tensor] = {}
    for key, value in prompt.items():
        many = torch.cat([value] * len(choices))
        if value.shape == prompt["input_ids"].shape:
            fill = pad if key == "input_ids" else 0
            many = torch.nn.functional.pad(many, (0, width - start), value=fill)
        batch[key] = many
    for i, tokens in enumerate(answers):
        batch["input_ids"][i, start : start + len(tokens)] = torch.tensor(tokens)
        batch["attention_mask"][i, start : start + len(tokens)] = 1
    logits = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
    logprobs = logits[:, start - 1 : -1].float().log_softmax(-1).cpu()
    return [
        float(logprobs[i, range(len(tokens)), tokens].sum())  # one value per token of the answer
        for i, tokens in enumerate(answers)
    ]


class Worker:
    """Answers rows and scores choices in order of arrival, in one thread. Stops at the first error of the engine."""

    def __init__(self, processor: Any, ends: frozenset[int], batch: int, threads: int) -> None:
        """``ends``: tokens that end an answer; ``batch``: maximum rows; ``threads``: torch's on the CPU."""
        self._processor = processor
        self._ends = ends
        self._batch = batch
        self._rows: list[tuple[nn.Module, BatchRow]] = []
        self._changing = threading.RLock()
        self._thread = ThreadPoolExecutor(1, "vlm-answers", torch.set_num_threads, (threads,))
        self.last_error = ""
        self.passed_at = time.monotonic()
        """End of the last forward pass, on the monotonic clock."""

    def put(self, model: nn.Module, row: BatchRow) -> None:
        """Queue a row. Raises :class:`EngineDead` when the thread has ended."""
        with self._changing:
            self._alive()
            self._rows.append((model, row))
            self._thread.submit(self._answer_next)

    def discard(self, row: BatchRow) -> None:
        """Drop a waiting row whose caller has gone, to free its images early."""
        with self._changing:
            self._rows = [pair for pair in self._rows if pair[1] is not row]

    async def score(self, model: nn.Module, request: GenerationRequest, choices: Sequence[str]) -> list[float]:
        asked = [request]
        with self._changing:
            self._alive()
            scores = asyncio.wrap_future(self._thread.submit(self._score, model, asked, choices))
        try:
            return await scores
        finally:
            asked.clear()  # frees the request now, not at its turn, if the caller has gone

    def stop(self, why: str) -> None:
        """Stop the thread after its current token; waiting rows fail with ``why``."""
        with self._changing:
            self.last_error = self.last_error or why
            self._thread.shutdown(wait=False)
            rows, self._rows = self._rows, []
        self._fail([row for _, row in rows])

    def join(self) -> None:
        self._thread.shutdown()

    def _answer_next(self) -> None:
        """Answer the oldest row, batched with further rows of its model."""
        with self._changing:
            model = self._rows[0][0] if self._rows else None
            taken = [pair for pair in self._rows if pair[0] is model][: self._batch]
            self._rows = [pair for pair in self._rows if pair not in taken]
        rows = [row for _, row in taken]
        if model is None:
            return
        try:
            self._answer(model, rows)
        except Exception as error:
            self.stop(f"transformers could not answer: {error!r}")
        if self.last_error:
            self._fail(rows)

    def _answer(self, model: nn.Module, rows: Sequence[BatchRow]) -> None:
        rows = [row for row in rows if not (row.done or row.aborted)]
        if not rows:
            return
        try:
            answer(model, self._processor, rows, self._ends, self._stopped)
        except Exception as error:
            if len(rows) == 1:
                self._check(model, error)
                rows[0].end(error)
                return
            log.warning("A batch of %d requests failed and is tried in halves: %r", len(rows), error)
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                self._answer(model, half)

    def _score(self, model: nn.Module, asked: Sequence[GenerationRequest], choices: Sequence[str]) -> list[float]:
        self._alive()
        if not asked:
            return []
        request = asked[0]
        scores: list[float] = []
        try:
            for start in range(0, len(choices), self._batch):
                scores += score(model, self._processor, request, choices[start : start + self._batch])
                self.passed_at = time.monotonic()
        except Exception as error:
            try:
                self._check(model, error)
            except Exception:
                self.stop(f"transformers could not answer: {error!r}")
                self._alive()
            raise as_failure(error) from error
        return scores

    def _check(self, model: nn.Module, error: Exception) -> None:
        """Raise a request's error again if the model cannot answer a good request either."""
        try:
            score(model, self._processor, PROBE, ["a"])
        except Exception:
            raise error from None

    def _stopped(self) -> bool:
        self.passed_at = time.monotonic()
        return bool(self.last_error)

    def _alive(self) -> None:
        if self.last_error:
            raise EngineDead(self.last_error)

    def _fail(self, rows: Sequence[BatchRow]) -> None:
        for row in rows:
            if not row.done:
                row.end(EngineDead(self.last_error))
