"""A bridge: an orthogonal map [dim, dim] of one release's image vectors into the image space of the next one, so that
vectors kept outside need not be embedded again. The gate fits and judges it (:mod:`updater.gate.cross_version`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from core.errors import StoreError

Matrix = npt.NDArray[np.float32]


def bridge_key(old: str, new: str) -> str:
    """Where the artifacts have the bridge between two image spaces."""
    return f"bridges/{old}-{new}.safetensors"


def dump_bridge(matrix: Matrix) -> bytes:
    data: bytes = save({"bridge": np.ascontiguousarray(matrix, np.float32)})
    return data


def parse_bridge(data: bytes) -> Matrix:
    """Raises StoreError for what :func:`dump_bridge` did not write."""
    try:
        matrix: Matrix = load(data)["bridge"]
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"a bridge between two image spaces is damaged: {error}.", "Embed the images again.") from None
    return matrix
