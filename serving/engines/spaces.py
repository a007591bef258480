"""Embedding spaces: what makes two vectors comparable, as a digest.

An image space is the digest of the image tower's weights (buffers included), of what an adapter changes them by, the
preprocessing and the dimension; a text space that of everything else that makes a text vector. An adapter that leaves
one tower alone leaves that tower's space alone, and then nothing of the catalog has to be embedded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.digests import digest12, digest_json, digest_tensor

if TYPE_CHECKING:
    import torch

Tower = Literal["image", "text"]
_OUTSIDE = ("logit_scale", "logit_bias")
"""Parameters that scale logits: they change no vector."""


@dataclass(frozen=True)
class Spaces:
    """The two embedding spaces of a base or of an adapter on it; 12 hex digits each."""

    image: str
    text: str


def tower_of(name: str) -> Tower | None:
    """The tower that owns a tensor or module of an open_clip model; None for logit scale and bias."""
    if name in _OUTSIDE:
        return None
    return "image" if name.split(".", 1)[0] == "visual" else "text"


def tensor_digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor (float32, row-major), by name."""
    return {
        name: digest_tensor(name, tensor.float() if tensor.is_floating_point() else tensor) for name, tensor in tensors
    }


def make_spaces(
    base_tensors: Mapping[str, str],
    preprocess: Mapping[str, object],
    tokenizer: str,
    context_length: int,
    dim: int,
    changed: Mapping[str, str] | None = None,
) -> Spaces:
    """Spaces of a base from the digests of its tensors, and of what changes some of them.

    ``tokenizer`` is the digest of vocabulary and options; ``preprocess`` the JSON form of the image preprocessing.
    """
    digests = dict(base_tensors) | {
        name: digest_json([base_tensors[name], change]) for name, change in (changed or {}).items()
    }

    def tower(which: Tower, how: Mapping[str, object]) -> str:
        weights = {name: digest for name, digest in digests.items() if tower_of(name) == which}
        return digest12(digest_json({"weights": weights, "how": how, "dim": dim}))

    return Spaces(
        image=tower("image", preprocess),
        text=tower("text", {"tokenizer": tokenizer, "context_length": context_length}),
    )
