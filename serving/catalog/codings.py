"""How the vectors of an index are kept in memory, and which way fits.

Each row has a product-quantized code of an eighth of a byte a dimension, which finds candidates (Jégou et al., "Product
quantization for nearest neighbor search", 2011; in the layout of André et al., "Quicker ADC", 2019, which computes 32
rows at a time), and a finer code, which ranks them. The finer code is the finest one that fits into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from core.errors import StoreError
from serving.catalog.row_columns import ROW_BYTES

ID_BYTES: Final = 8
ROOM: Final = 1.15
"""Arrays grow ahead of their rows."""


class IndexTooLarge(StoreError):
    """An index does not fit into memory, however it is coded."""


@dataclass(frozen=True, slots=True)
class Coding:
    """The finer code of each vector."""

    name: str
    bits: int
    """Of each dimension; 0: there is none, and candidates are ranked by what found them."""

    def row_bytes(self, dimension: int) -> float:
        """Of both codes."""
        return dimension / 8 + ID_BYTES + dimension * self.bits / 8


CODINGS: Final = (Coding("16 bits", 16), Coding("8 bits", 8), Coding("4 bits", 4), Coding("quantized alone", 0))
"""The finest first."""


def choose_coding(rows: int, dimension: int, text_bytes: float, most_bytes: float) -> Coding:
    """The finest one with which an index of so many rows fits.

    Args:
        text_bytes: of a row's text, on average.
        most_bytes: for all of the index.

    Raises:
        IndexTooLarge: none fits.
    """
    for coding in CODINGS:
        if estimated_bytes(rows, dimension, text_bytes, coding) <= most_bytes:
            return coding
    least = estimated_bytes(rows, dimension, text_bytes, CODINGS[-1])
    raise IndexTooLarge(
        f"an index of {rows} rows takes {least / 2**30:.2f} GiB, and may take {most_bytes / 2**30:.2f} GiB.",
        "Raise catalog.cache_gib; until then searches are exact.",
    )


def estimated_bytes(rows: int, dimension: int, text_bytes: float, coding: Coding) -> float:
    """Memory of an index."""
    return rows * ROOM * (coding.row_bytes(dimension) + ROW_BYTES + text_bytes)
