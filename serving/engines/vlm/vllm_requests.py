"""Converts a :class:`GenerationRequest` to vLLM's input and parameters, in a thread, and its outputs back.

vLLM's own preprocessing (hash the image, call the processor, expand and search placeholders) takes several times as
long as the processor alone. For models whose images are single runs of image tokens, the processor's output is passed
on directly; :meth:`Prompts.check` compares both ways at start and falls back to vLLM's if they differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from serving.engines.vlm.generation import MAX_IMAGES, Finish, GenerationRequest, Image
from serving.engines.vlm.prompts import answer_tokens, check_length, inputs, render
from serving.errors import InvalidRequest

_ONE_RUN = ("idefics3", "smolvlm")
"""Architectures whose images are one run of tokens each, unless images are split into tiles."""


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
    from vllm.sampling_params import RequestOutputKind

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
