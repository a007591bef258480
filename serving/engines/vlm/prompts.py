"""Builds model inputs from requests. Trainer, gate and both engines use it, so they see the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from serving.engines.vlm.generation import GenerationRequest
from serving.errors import InvalidRequest


def conversation(request: GenerationRequest) -> list[dict[str, Any]]:
    """The turns in the form of chat templates; an image is ``{"type": "image"}``. Raises :class:`InvalidRequest`
    without turns, or unless each image is used once, in reading order."""
    if not request.messages:
        raise InvalidRequest("There is no message to answer.", "Send at least one message of the user.")
    used = [part for message in request.messages for part in message.content if not isinstance(part, str)]
    if used != list(range(len(request.images))):
        raise InvalidRequest(
            f"The messages use the images {used}, and there are {len(request.images)}.",
            "Use every image once, numbered from 0 in reading order.",
        )
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in request.messages
    ]


def render(processor: Any, request: GenerationRequest) -> str:
    """The prompt text up to the start of the answer, with one image token per image. Raises :class:`InvalidRequest`,
    also when a text contains the image token or the chat template refuses the turns."""
    turns = conversation(request)
    token = image_token(processor)
    if token and any(
        token in part for message in request.messages for part in message.content if isinstance(part, str)
    ):
        raise InvalidRequest(f"A text holds {token!r}, which stands for an image.", "Take it out of the text.")
    from jinja2 import TemplateError

    try:
        return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise InvalidRequest(
            f"The model's chat template refuses the messages: {error}.", "Change the roles."
        ) from error


def inputs(
    processor: Any, asks: Sequence[GenerationRequest], device: str | torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of the transformers model for a batch: ``input_ids`` and ``attention_mask`` [n, tokens], left padded, and
    image pixels. Raises :class:`InvalidRequest`."""
    texts = [render(processor, request) for request in asks]
    # Not arrays: for images 1 or 3 pixels high, the processor would take the first axis for channels.
    images = [[Image.fromarray(image) for image in request.images] for request in asks]
    more: dict[str, Any] = {"images": images} if any(images) else {}
    # The chat template already wrote the special tokens.
    batch = processor(
        text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt", **more
    )
    return {key: value if device is None else value.to(device) for key, value in batch.items()}


def image_token(processor: Any) -> str:
    """The text that represents an image in a prompt; empty if the processor has none."""
    token = getattr(processor, "image_token", "")
    return str(getattr(token, "content", token) or "")


def end_token(processor: Any) -> int:
    return int(processor.tokenizer.eos_token_id)


def answer_tokens(processor: Any, text: str) -> list[int]:
    """Tokens of an answer after a rendered prompt, its end included."""
    return [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end_token(processor)]


def check_length(tokens: int, context: int) -> None:
    """Raise :class:`InvalidRequest` when so many tokens leave no room for an answer in ``context``."""
    if tokens >= context:
        raise InvalidRequest(
            f"The request has {tokens} tokens, images included; with its answer it may have {context} "
            "(serve.vlm_context).",
            "Shorten it.",
        )
