"""Sample ids, which are SHA-256 digests in 64 hexadecimal digits, as arrays of bytes and of 64-bit keys.

>>> digests = digests_of(pa.array(["00" * 7 + "2a" + "00" * 24]))
>>> digests.shape, keys_of(digests)
((1, 32), array([42], dtype=uint64))
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.errors import StoreError

Digests = npt.NDArray[np.uint8]
"""uint8 [n, 32]."""
Keys = npt.NDArray[np.uint64]
"""The first 64 bits of digests: two of a million samples share them with a probability of 3e-8."""
DIGITS: Final = 64
_VALUES: Final = np.full(256, 255, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_VALUES[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


def digests_of(ids: pa.Array | pa.ChunkedArray) -> Digests:
    """Digests [n, 32] of ids. Raises StoreError when one is no digest."""
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if not len(column):  # also of no chunks at all
        return np.empty((0, DIGITS // 2), np.uint8)
    column = column.cast(pa.string())
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    values = _VALUES[np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]]
    if column.null_count or (np.diff(ends) != DIGITS).any() or (values > 15).any():
        raise StoreError("an id in the catalog is no SHA-256 digest.", "Report this.")
    pairs = values.reshape(-1, DIGITS // 2, 2)
    return np.ascontiguousarray((pairs[:, :, 0] << 4) | pairs[:, :, 1])


def keys_of(digests: Digests) -> Keys:
    """Keys [n] of digests [n, 32]."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


def keys_of_ids(ids: list[str]) -> Keys:
    """Keys [n] of ids."""
    return keys_of(digests_of(pa.array(ids, pa.string())))
