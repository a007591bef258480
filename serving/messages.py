"""Messages between the ingress and the models. Imports no model code, which keeps processes without models small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Modality = Literal["image", "text"]
TEXT_COST = 1
IMAGE_COST = 4
IMAGES_PER_REQUEST = 32
TEXTS_PER_REQUEST = 256
TEXT_CHARS = 2000
"""Bounds of one request: two batches of images, four of texts. A client with more sends several requests, and others
get turns between them. A text has as many characters as ingest accepts; CLIP reads some 300 of them."""
PROMPTS_PER_TEXT = 8
"""Labels x templates may be this many times :data:`TEXTS_PER_REQUEST`: prompts are short, and made by the server."""
MODEL_NICE = 1
"""Niceness of processes that compute: where cores are scarce, requests and operator calls come first. On two cores that
four models kept busy, a rollback took 1.5 s with the same niceness for all, and 0.3 s with the VLM at 10."""
VLM_NICE = 10
"""A VLM generates for seconds; at the same niceness an embedding, which takes milliseconds, would wait as long."""


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """One request's items in a batch. ``payload``: uint8 [n, S, S, 3], or n lists of token IDs (``Tokenizer.rows``).
    ``deadline``: monotonic clock of the encoding process; processes pass each other the time left. ``caller``: empty
    for the server's own work, such as probes."""

    kind: Modality
    payload: Any
    adapter: str | None
    deadline: float
    caller: str = ""

    @property
    def cost(self) -> int:
        """In units of one text; an image costs four."""
        return len(self.payload) * self._item_cost

    def beginning(self, cost: float) -> EncodeRequest:
        """The first items that together cost at most ``cost``, at least one item."""
        if self.cost <= cost:
            return self
        return replace(self, payload=self.payload[: max(1, int(cost / self._item_cost))])

    @property
    def _item_cost(self) -> int:
        return IMAGE_COST if self.kind == "image" else TEXT_COST


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Vectors float32 [n, dim] under one adapter; or ``error`` with ``code``: ``late``, ``adapter``, or ``failed`` when
    the forward pass raised."""

    vectors: npt.NDArray[np.float32] | None
    adapter: str | None
    image_space: str = ""
    text_space: str = ""
    logit_scale: float = 1.0
    code: str = ""
    error: str = ""

    def space(self, kind: Modality) -> str:
        return self.image_space if kind == "image" else self.text_space


def joined(parts: Sequence[EncodeResult]) -> EncodeResult:
    """Join the results of one request's parts, in order and under one adapter: all vectors, or the first failure."""
    for part in parts:
        if part.code or len(parts) == 1:
            return part
    return replace(parts[0], vectors=np.concatenate([part.vectors for part in parts if part.vectors is not None]))


@dataclass(frozen=True, slots=True)
class HeadsResult:
    """The heads of an adapter by name (:class:`serving.engines.heads.Head`); ``error`` where it cannot be loaded."""

    heads: dict[str, Any]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An expected failure of a VLM replica, returned as a value: an exception would mean that the replica is dead."""

    code: Literal["late", "ask", "adapter", "busy"]
    message: str
    fix: str = ""
    param: str | None = None
    """The field of the request that is wrong."""
