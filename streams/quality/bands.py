"""Numbers by which looks that are alike are found without comparing with all.

A hash is cut into ``distance + 1`` bands: two hashes that differ in fewer bits than there are bands agree in one of
them (pigeonhole; Norouzi et al., Fast Exact Search in Hamming Space, 2012). A band's number is made of its bits and of
the words of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_ALL_BITS: Final = 2**64 - 1
_SIGN: Final = 2**63
"""SQLite's integers are signed."""
_ODD: Final = 0x9E3779B97F4A7C15
_NO_PHASH: Final = bytes(8)


def masks(distance: int) -> list[int]:
    """One mask of 64 bits for each band; together they cover each bit once. None for a negative distance."""
    ends = [64 * number // (distance + 1) for number in range(distance + 2)] if distance >= 0 else []
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(ends)]


def bands_of(phash: int, words: int, masks: Sequence[int]) -> list[int]:
    """Numbers of a look's bands, signed 64 bits."""
    return [((words + (phash & mask) * _ODD + number) & _ALL_BITS) - _SIGN for number, mask in enumerate(masks)]


def bands_of_all(looks: Sequence[bytes | None], words: npt.NDArray[Any], masks: Sequence[int]) -> Iterator[list[int]]:
    """For each band its numbers in all looks, as by :func:`bands_of`; any number for one that is None.

    Args:
        looks: each beginning with the 8 bytes of its hash, the highest first.
        words: [N], int64.
    """
    phashes = np.frombuffer(b"".join((look or _NO_PHASH)[:8] for look in looks), ">u8").astype(np.uint64)
    for number, mask in enumerate(masks):
        with np.errstate(over="ignore"):
            hashes = (phashes & np.uint64(mask)) * np.uint64(_ODD)
            numbers = words.astype(np.uint64) + hashes + np.uint64(number) - np.uint64(_SIGN)
        yield numbers.view(np.int64).tolist()
