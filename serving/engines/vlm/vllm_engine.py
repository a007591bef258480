"""The VLM engine on vLLM: many adapters in one batch, the model in a separate process. These rules keep every answer
that of its own adapter, where vLLM by itself would not:

- a name is a digest of content and never changes: vLLM caches image features by name;
- vLLM's integer IDs are never reused, and no adapter is loaded over another;
- requests name an adapter only after vLLM confirmed that it is loaded, and vLLM never gets more adapters than slots:
  reading one again from a directory that is gone would crash the engine;
- an adapter is removed only after its last request;
- requests for the base run under an adapter whose delta is zero.

vLLM's own preprocessing takes several times as long as the processor alone. For models whose images are single runs of
image tokens, the processor's output is passed on directly, unless :meth:`Prompts.check` finds a difference at start."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from core.errors import AdapterError, ConfigError, RatchetError
from core.settings.serving import Serve
from serving.engines.vlm.adapters import (
    BASE,
    PROBE_SIZE,
    PROBED,
    Residents,
    Shapes,
    differ,
    fingerprint,
    golden_requests,
    linear_shapes,
    parts_of,
    read_validated_adapter,
    write_probe,
)
from serving.engines.vlm.generation import (
    MAX_IMAGES,
    Detokenizer,
    Finish,
    GenerationRequest,
    GenerationResult,
    Image,
    TokenChunk,
    whole,
)
from serving.engines.vlm.prompts import answer_tokens, check_length, inputs, render
from serving.engines.vlm.vllm_start import (
    ZERO_ID,
    cache_folder,
    child_environment,
    engine_arguments,
    import_vllm,
    slots_of,
)
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest

CLOSE_SECONDS = 5.0
"""Time for the engine's process to end by itself before it is killed."""
LOOK_SECONDS = 0.5
"""Interval of liveness checks while an adapter is loaded or unloaded."""
Result = TypeVar("Result")
_ONE_RUN = ("idefics3", "smolvlm")
"""Architectures whose images are one run of tokens each, unless images are split into tiles."""


class VllmEngine:
    kind: Literal["vllm", "transformers"] = "vllm"

    def __init__(self, base: VlmBase, serve: Serve) -> None:
        self.base = base
        self._serve = serve
        self._engine: Any = None
        self._prompts: Prompts | None = None
        self._shapes: Shapes = {}
        self.ignored_parts: frozenset[str] = frozenset()
        """Parts of the model whose adapters vLLM does not apply; known after :meth:`start`."""
        self._residents: Residents[Any] = Residents(slots_of(serve))
        self._ids = itertools.count(ZERO_ID)
        self._requests = itertools.count()
        self.passed_at = 0.0
        self._closed = False

    @property
    def precision(self) -> str:
        """The data type that vLLM chose where ``dtype`` is auto; empty before :meth:`start`."""
        return "" if self._engine is None else str(self._engine.model_config.dtype).removeprefix("torch.")

    async def start(self) -> None:
        """Start vLLM (5 to 30 s), load the zero adapter, and find out which parts take adapters. Raises
        :class:`ConfigError` for a broken installation or a base that does not load. A failed start deletes the caches,
        so that a half-written file of a killed process fails one start only."""
        try:
            processor = await asyncio.to_thread(self._start)
            model_type = str(self._engine.model_config.hf_config.model_type)
            self._prompts = Prompts(processor, self._engine.renderer, model_type, self._serve.vlm_context)
            await asyncio.to_thread(self._prompts.check, golden_requests())
            with tempfile.TemporaryDirectory(prefix="ratchet-vlm-") as folder:
                zero = write_probe(Path(folder) / "zero", self._shapes, 0.0)
                await self._residents.add(BASE, lambda: self._add("zero", zero))
                self.ignored_parts = frozenset({part for part in PROBED if not await self._applies(part, Path(folder))})
        except BaseException as error:
            await self.close()
            if isinstance(error, Exception):
                await asyncio.to_thread(shutil.rmtree, cache_folder(self.base), ignore_errors=True)
            raise

    async def _applies(self, part: str, folder: Path) -> bool:
        """True if an adapter of ``part`` changes an answer, or the part has no layers."""
        shapes = {name: shape for name, shape in self._shapes.items() if self.base.part_of(name) == part}
        if not shapes:
            return True
        name, written = f"probe-{part}", write_probe(folder / part, shapes, PROBE_SIZE)
        await self._residents.add(name, lambda: self._add(name, written))
        applied = differ(await self._golden(None), await self._golden(name))
        await self.unload(name)
        return applied

    def _start(self) -> Any:
        import_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        processor = self.base.processor()
        self._shapes = linear_shapes(self.base)
        try:
            with child_environment(self.base, self._serve):
                arguments = AsyncEngineArgs(**engine_arguments(self.base, self._serve))
                engine = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"vLLM does not start with the base {self.base.name!r}: {error}",
                "Set VLLM_LOGGING_LEVEL=INFO to see why, or serve.vlm_engine to transformers.",
            ) from error
        if self._closed:  # closed while it started
            engine.shutdown(timeout=CLOSE_SECONDS)
        else:
            self._engine = engine
        return processor

    async def load(self, name: str, directory: Path) -> None:
        self._alive()

        async def checked() -> Any:
            rank = self._serve.vlm_max_rank
            files = await asyncio.to_thread(read_validated_adapter, self.base, self._shapes, name, directory, rank)
            unserved = sorted(parts_of(self.base, files) & self.ignored_parts)
            if unserved:
                raise AdapterError(
                    f"Adapter {name} changes the {' and the '.join(unserved)} part, which vLLM does not apply here.",
                    "Train the text part only, or set serve.vlm_engine to transformers.",
                )
            return await self._add(name, directory)

        await self._residents.add(name, checked)

    async def _add(self, name: str, directory: Path) -> Any:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self._ids), str(directory.resolve()))
        try:
            added = await self._while_alive(self._engine.add_lora(request))
        except Exception as error:
            self._alive()
            raise AdapterError(f"vLLM refuses the adapter {name}: {error}", "Train a plain LoRA adapter.") from error
        if not added:
            raise AdapterError(f"vLLM did not load the adapter {name}.", "Look at the server's log.")
        return request

    async def unload(self, name: str) -> None:

        async def drop(request: Any) -> None:
            if not self.last_error():
                await self._while_alive(self._engine.remove_lora(request.lora_int_id))

        await self._residents.remove(name, drop)

    def resident(self) -> frozenset[str]:
        return self._residents.names()

    async def stream(self, request: GenerationRequest, adapter: str | None) -> AsyncGenerator[TokenChunk]:
        self._alive()
        with self._residents.using(adapter) as lora:
            (prompt,) = await self._render(request)
            detokenizer = Detokenizer(self._tokenizer, request.stop)
            length, done = len(prompt["prompt_token_ids"]), 0
            outputs = self._outputs(prompt, sampling(request, every=True), lora)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    one = output.outputs[0]
                    tokens, finish = tuple(one.token_ids), finish_of(one.finish_reason)
                    text = detokenizer.take(tokens, bool(finish))
                    done += len(tokens)
                    finish = "stop" if detokenizer.stopped else finish
                    if tokens or finish:
                        yield TokenChunk(text, tokens, logprobs_of(one), length, done, finish)
                    if detokenizer.stopped:
                        return

    async def reply(self, request: GenerationRequest, adapter: str | None) -> GenerationResult:
        if request.stop:
            return await whole(self.stream(request, adapter))
        self._alive()
        with self._residents.using(adapter) as lora:
            (prompt,) = await self._render(request)
            one = (await self._last(prompt, sampling(request, every=False), lora)).outputs[0]
            text = self._tokenizer.decode(one.token_ids, skip_special_tokens=True)
            finish = finish_of(one.finish_reason)
            return GenerationResult(
                text, tuple(one.token_ids), logprobs_of(one), len(prompt["prompt_token_ids"]), finish
            )

    async def score(self, request: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        plan = scoring()
        self._alive()
        with self._residents.using(adapter) as lora:
            (plain,) = await self._render(request)
            prompts = await self._render(request, choices)

            async def one(prompt: dict[str, Any]) -> float:
                output = await self._last(prompt, plan, lora)
                start = len(plain["prompt_token_ids"])
                tokens = prompt["prompt_token_ids"]
                return float(sum(output.prompt_logprobs[i][tokens[i]].logprob for i in range(start, len(tokens))))

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
            return [task.result() for task in tasks]

    async def golden(self, adapter: str | None) -> str:
        return fingerprint(adapter, await self._golden(adapter))

    async def _golden(self, adapter: str | None) -> list[GenerationResult]:
        return [await self.reply(request, adapter) for request in golden_requests()]

    def running(self) -> int:
        return self._residents.running()

    def last_error(self) -> str:
        if self._closed:
            return "The engine was closed."
        if self._engine is None:
            return "The engine was not started."
        if not self._engine.errored:
            return ""
        manager = self._engine.engine_core.resources.engine_manager
        codes = [p.exitcode for p in getattr(manager, "processes", []) if p.exitcode is not None]
        ended = f" (exit code {codes[0]})" if codes else ""
        return f"vLLM's engine process ended{ended}: its own message is in the log."

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._prompts is not None:
            self._prompts.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # it would report the end of the engine's process as an error
            await asyncio.to_thread(engine.shutdown, timeout=CLOSE_SECONDS)
            engine.shutdown = lambda: None  # its destructor would call it again, in vain at interpreter exit

    async def _while_alive(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Await a call; raises EngineDead if the engine dies, since vLLM then never answers it."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([task], timeout=LOOK_SECONDS))[0]:
                self._alive()
            return await task
        finally:
            task.cancel()

    def _alive(self) -> None:
        last_error = self.last_error()
        if last_error:
            raise EngineDead(last_error)

    @property
    def _tokenizer(self) -> Any:
        return self._engine.renderer.tokenizer

    async def _render(self, request: GenerationRequest, answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        assert self._prompts is not None
        try:
            return await self._prompts.make(request, answers)
        except RatchetError:
            raise
        except Exception as error:  # templates, tokenizers and image processors raise anything
            self._alive()
            raise InvalidRequest(f"The request cannot be read: {error}", "Change the messages or the image.") from error

    async def _outputs(self, prompt: dict[str, Any], sampling: Any, lora: Any) -> AsyncGenerator[Any]:
        """vLLM's outputs, with its errors translated. Closing it aborts the request inside vLLM."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        outputs = self._engine.generate(prompt, sampling, f"r{next(self._requests)}", lora_request=lora)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self.passed_at = time.monotonic()
                    yield output
        except VLLMClientError as error:
            raise InvalidRequest(f"vLLM refuses the request: {error}", "Change the request.") from error
        except (EngineDeadError, EngineGenerateError) as error:
            last_error = self.last_error()
            if not last_error and isinstance(error, EngineGenerateError):  # this request's error only
                cause = error.__cause__ or error
                raise InvalidRequest(f"vLLM could not answer the request: {cause!r}", "Change the request.") from error
            raise EngineDead(last_error or f"vLLM could not answer: {error!r}") from error

    async def _last(self, prompt: dict[str, Any], sampling: Any, lora: Any) -> Any:
        outputs = self._outputs(prompt, sampling, lora)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                return output  # FINAL_ONLY: there is one
        raise EngineDead(self.last_error() or "vLLM ended a request without an answer.")


class Prompts:
    """Builds vLLM's ``EngineInput``. ``renderer``: the engine's."""

    def __init__(self, processor: Any, renderer: Any, model_type: str, context: int) -> None:
        self._processor = processor
        self._renderer = renderer
        self._context = context
        # One thread: fast tokenizers cannot be used by two at once.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlm-prompts")
        splitting = getattr(processor.image_processor, "do_image_splitting", True)
        self.fast = model_type in _ONE_RUN and not splitting

    async def make(self, request: GenerationRequest, answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The prompt, or with ``answers`` the prompt followed by each. Raises :class:`InvalidRequest`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._make, request, answers)

    def check(self, asks: Sequence[GenerationRequest]) -> bool:
        """Use the fast way only if it gives the same inputs as vLLM's own."""
        self.fast = self.fast and all(_same(self._short(request), self._long(request)) for request in asks)
        return self.fast

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, request: GenerationRequest, answers: Sequence[str] | None) -> list[dict[str, Any]]:
        if len(request.images) > MAX_IMAGES:
            raise InvalidRequest(
                f"There are {len(request.images)} images; a request may have {MAX_IMAGES}.", "Send fewer."
            )
        prompt = self._short(request) if self.fast else self._long(request)
        if answers is None:
            check_length(len(prompt["prompt_token_ids"]), self._context)
            return [prompt]
        prompts = []
        for answer in answers:
            tokens = [*prompt["prompt_token_ids"], *answer_tokens(self._processor, answer)]
            check_length(len(tokens), self._context)
            prompts.append(prompt | {"prompt_token_ids": tokens})
        return prompts

    def _short(self, request: GenerationRequest) -> dict[str, Any]:
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        batch = inputs(self._processor, [request])
        tokens = batch["input_ids"][0]
        if not request.images:
            return dict(tokens_input(tokens.tolist()))
        where = (tokens == self._processor.image_token_id).nonzero().flatten().tolist()
        seats = self._processor.image_seq_len
        starts = where[::seats]
        hf = {
            "pixel_values": batch["pixel_values"][0],
            "pixel_attention_mask": batch["pixel_attention_mask"][0],
            "num_patches": torch.ones(len(request.images), dtype=torch.long),
        }
        fields = self._renderer.get_mm_processor()._get_mm_fields_config(hf, {})
        return dict(
            mm_input(
                tokens.tolist(),
                MultiModalKwargsItems.from_hf_inputs(hf, fields),
                {"image": [_digest(image) for image in request.images]},
                {"image": [PlaceholderRange(start, seats) for start in starts]},
            )
        )

    def _long(self, request: GenerationRequest) -> dict[str, Any]:
        from PIL import Image as Pictures
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt: dict[str, Any] = {"prompt": render(self._processor, request)}
        if request.images:
            prompt["multi_modal_data"] = {"image": [Pictures.fromarray(image) for image in request.images]}
            prompt["multi_modal_uuids"] = {"image": [_digest(image) for image in request.images]}
        parsed = parse_model_prompt(self._renderer.model_config, prompt)
        (rendered,) = self._renderer.render_cmpl(
            [parsed], self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        )
        return dict(rendered)


def _digest(image: Image) -> str:
    shape = np.asarray(image.shape, np.int64).tobytes()
    return blake2b(shape + np.ascontiguousarray(image).tobytes(), digest_size=16).hexdigest()


def _same(short: dict[str, Any], long: dict[str, Any]) -> bool:
    """True for equal tokens, pixels and positions of image features."""
    if short["prompt_token_ids"] != long["prompt_token_ids"] or short["type"] != long["type"]:
        return False
    if short["type"] != "multimodal":
        return True
    pairs = zip(short["mm_placeholders"]["image"], long["mm_placeholders"]["image"], strict=True)
    if any(a.extract_embeds_range() != b.extract_embeds_range() for a, b in pairs):
        return False
    ours, theirs = (each["mm_kwargs"]["image"] for each in (short, long))
    return all(
        one.keys() == other.keys() and all(torch.equal(one[key].data, other[key].data) for key in one)
        for one, other in zip(ours, theirs, strict=True)
    )


def sampling(request: GenerationRequest, every: bool) -> Any:
    """SamplingParams of a request. ``every``: output per step with new tokens, instead of one at the end. vLLM does not
    detokenize; :class:`serving.engines.vlm.generation.Detokenizer` does for both engines. Raises
    :class:`InvalidRequest` for parameters that vLLM refuses."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,  # no other request uses this object
            structured_outputs=StructuredOutputsParams(json=request.json_schema) if request.json_schema else None,
            output_kind=RequestOutputKind.DELTA if every else RequestOutputKind.FINAL_ONLY,
        )
    except VLLMClientError as error:
        raise InvalidRequest(f"vLLM refuses the request: {error}", "Change its parameters.") from error


def scoring() -> Any:
    """SamplingParams that return the log-probability of every prompt token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def logprobs_of(completion: Any) -> tuple[float, ...]:
    """Log-probability of each token of a completion: the sampled token is the first at its position."""
    flat = completion.logprobs
    return tuple(flat.logprobs[start] for start in flat.start_indices) if flat else ()


def finish_of(reason: str | None) -> Finish:
    return "" if reason is None else "stop" if reason == "stop" else "length"
