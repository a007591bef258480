"""From an Ask to what the model reads: trainer, gate and both engines build their prompts here, and see the same.

>>> batch = inputs(processor, [question(pixels, "what is this?")])
>>> model(**batch).logits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from serving.engines.vlm.generation import GenerationRequest
from serving.errors import InvalidRequest


def conversation(request: GenerationRequest) -> list[dict[str, Any]]:
    """The turns as chat templates take them; an image is ``{"type": "image"}``.

    Raises :class:`InvalidRequest`: no turn, or images that are not used once each, in reading order.
    """
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
    """The prompt as text, up to where the answer begins; one image token stands for each image.

    Raises :class:`InvalidRequest` also when a text holds the image token, or the chat template refuses the turns.
    """
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
    """The inputs of the transformers model for a batch: ``input_ids`` and ``attention_mask`` [n, tokens], padded on the
    left, and the pixels of the images. Raises :class:`InvalidRequest`."""
    texts = [render(processor, request) for request in asks]
    # Not as arrays: of a picture 1 or 3 pixels high the processor would take the first axis for the channels.
    images = [[Image.fromarray(image) for image in request.images] for request in asks]
    more: dict[str, Any] = {"images": images} if any(images) else {}
    # The chat template wrote every special token; none is added.
    batch = processor(
        text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt", **more
    )
    return {key: value if device is None else value.to(device) for key, value in batch.items()}


def image_token(processor: Any) -> str:
    """The text that stands for an image in a prompt; empty when the processor does not say."""
    token = getattr(processor, "image_token", "")
    return str(getattr(token, "content", token) or "")


def end_token(processor: Any) -> int:
    """The token that ends an answer."""
    return int(processor.tokenizer.eos_token_id)


def answer_tokens(processor: Any, text: str) -> list[int]:
    """The tokens of an answer, its end included, as they follow a rendered prompt."""
    return [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end_token(processor)]


def check_length(tokens: int, context: int) -> None:
    """Raises :class:`InvalidRequest` when a request of so many tokens leaves no room for an answer in ``context``."""
    if tokens >= context:
        raise InvalidRequest(
            f"The request has {tokens} tokens, images included; with its answer it may have {context} "
            "(serve.vlm_context).",
            "Shorten it.",
        )
