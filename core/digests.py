"""Content digests: SHA-256, shown as 12 hex digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ratchet_client.records import digest_bytes as digest_bytes

if TYPE_CHECKING:
    import torch


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest12(value: str | bytes) -> str:
    """The first 12 hex digits of a hex digest, or of the digest of bytes."""
    return (digest_bytes(value) if isinstance(value, bytes) else value)[:12]


def share_of(text: str) -> float:
    """A number from 0 to 1 that depends only on the text, for stable random choices."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def digest_tensor(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 of a named tensor: name, dtype, shape and bytes, row-major. 64 hex digits."""
    import torch  # settings and the ledger must not wait for torch

    flat = tensor.detach().to("cpu").contiguous()
    raw = flat.reshape(-1).view(torch.uint8).numpy().data  # a copy would hold the GIL
    return digest_bytes(name.encode(), str(flat.dtype).encode(), str(tuple(flat.shape)).encode(), raw)


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over named tensors, in any order. 64 hex digits."""
    return digest_bytes(*(digest_tensor(name, tensors[name]).encode() for name in sorted(tensors)))
