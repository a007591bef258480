"""Messages between the ingress and the models. Imports no model code, so that processes without one stay small."""

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
"""Bounds of one request, two batches of images and four of texts: a client that has more sends several, and others get
their turns between them. A text has as many characters as ingest accepts; a CLIP reads some 300 of them."""
PROMPTS_PER_TEXT = 8
"""Labels x templates may be this many times :data:`TEXTS_PER_REQUEST`: prompts are short, and made by the server."""
MODEL_NICE = 1
"""Niceness of processes that compute: where processors are scarce, those that carry requests and operator calls come
first. With the same niceness, the VLM's too, a rollback took 1.5 s on two cores that four models kept busy; with the
VLM's at 10 it takes 0.3 s."""
VLM_NICE = 10
"""Of those that generate for seconds: next to them an embedding takes milliseconds, and would wait as long as they."""


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """One item of a batch. ``payload``: uint8 [n, S, S, 3], or n lists of token ids (see ``Tokenizer.rows``).
    ``deadline``: on the monotonic clock of the process that encodes; between processes the time left is passed, because
    their clocks may differ. ``caller``: whose turn it takes; empty: the server's own, as for probes.
    """

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
        """As many of the first items as cost so much together; one at least."""
        if self.cost <= cost:
            return self
        return replace(self, payload=self.payload[: max(1, int(cost / self._item_cost))])

    @property
    def _item_cost(self) -> int:
        return IMAGE_COST if self.kind == "image" else TEXT_COST


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Vectors float32 [n, dim], made by one adapter; or ``error`` with ``code``: ``late``, ``adapter``, or ``failed``
    when the forward pass raised.
    """

    vectors: npt.NDArray[np.float32] | None
    adapter: str | None
    image_space: str = ""
    text_space: str = ""
    logit_scale: float = 1.0
    code: str = ""
    error: str = ""

    def space(self, kind: Modality) -> str:
        """The embedding space of vectors of this kind."""
        return self.image_space if kind == "image" else self.text_space


def joined(parts: Sequence[EncodeResult]) -> EncodeResult:
    """Of parts of one request, in their order, under one adapter: all vectors together, or the first failure."""
    for part in parts:
        if part.code:
            return part
    return replace(parts[0], vectors=np.concatenate([part.vectors for part in parts if part.vectors is not None]))


@dataclass(frozen=True, slots=True)
class HeadsResult:
    """The heads of one adapter by name (:class:`serving.engines.heads.Head`); ``error`` where it cannot be loaded."""

    heads: dict[str, Any]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason why a VLM replica did not answer: an expected failure, which is a value. What is raised is a dead
    replica.
    """

    code: Literal["late", "ask", "adapter", "busy"]
    message: str
    fix: str = ""
