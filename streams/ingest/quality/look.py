"""What a picture looks like: its shapes and its colours, in a few bytes that another encoding hardly changes.

A picture is scaled once, to 32x32. Its **perceptual hash** is the signs of the 8x8 lowest coefficients of the discrete
cosine transform of its brightness, as in pHash (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010). A coefficient counts as positive only above a quarter of a grey level: in pictures with plain or
symmetric parts many are zero, and noise would decide their signs. Its **colours** are the means of a 3x3 grid, because
the hash knows nothing of them: shirts in six colours have one hash, and all plain pictures have.

All arithmetic is on whole numbers (in float64, which holds them exactly), so that a picture has the same look on every
machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE: Final = 32
GRID: Final = 3
COLOUR_TOLERANCE: Final = 16
"""Most by which a channel of a cell may differ in pictures that look alike, of 255.

Measured over 670 pictures of seven kinds (emoji, flags, clothes, photographs, drawings, crops of photographs, pages):
JPEG at quality 70 changes it by 8 at most, at 90 by 6, WebP at 80 by 6, half the size by 3, and half the size as
JPEG by 11. A thing in another colour is seen where it fills a tenth of a cell, if the colours are far apart.
"""
_DEAD_ZONE: Final = 0.25
"""Grey levels of amplitude."""
_SCALE: Final = 4096


def _cosines() -> npt.NDArray[np.float64]:
    """[8, 32]: the lowest rows of the orthonormal DCT-II, times :data:`_SCALE`, rounded."""
    row, column = np.arange(8)[:, None], np.arange(SIDE)[None, :]
    rows: npt.NDArray[np.float64] = np.cos(np.pi * row * (2 * column + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    rows[0] /= np.sqrt(2)
    np.rint(rows * _SCALE, out=rows)
    return rows


def _cells() -> npt.NDArray[np.float64]:
    """[3, 32]: by how many thirds of a pixel each column lies in each third of the picture. Rows add up to 32."""
    edges = np.arange(GRID + 1) * SIDE
    pixels = np.arange(SIDE) * GRID
    overlap: npt.NDArray[np.int64] = np.minimum(edges[1:, None], pixels + GRID) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, GRID).astype(np.float64)


_COSINES = _cosines()
_CELLS = _cells()
_BRIGHTNESS = np.array([299.0, 587.0, 114.0])
_THRESHOLD = _DEAD_ZONE * SIDE * _SCALE**2 * 1000
"""An amplitude of one level is a coefficient of 32 where the transform is orthonormal."""
_LOWEST = sorted(
    ((i, j) for i in range(8) for j in range(8) if i or j), key=lambda index: (index[0] ** 2 + index[1] ** 2, index)
)

LOOK_BYTES: Final = 8 + 3 * GRID**2
_COLOUR_STEP: Final = 32
_COLOUR_SHIFT: Final = 5
_BUCKETS: Final = [sum(1 << (63 - (8 * i + j)) for i, j in _LOWEST[:bits]) for bits in (12, 24)]


@dataclass(frozen=True, slots=True)
class Look:
    """Shapes and colours of a picture."""

    phash: int
    """64 bits, row by row of the 8x8, the highest first; that one, of the mean brightness, is never set."""
    colours: bytes
    """27 bytes: the mean R, G and B of each cell of a 3x3 grid, row by row."""

    @property
    def data(self) -> bytes:
        """:data:`LOOK_BYTES` bytes: the hash in 8, big-endian, then the colours."""
        return self.phash.to_bytes(8, "big") + self.colours

    @classmethod
    def parse(cls, data: bytes) -> Look:
        """The look of which this is :attr:`data`. Raises ValueError."""
        if len(data) != LOOK_BYTES:
            raise ValueError(f"{data[:100]!r} is no look: it has not {LOOK_BYTES} bytes")
        return cls(int.from_bytes(data[:8], "big"), data[8:])


def look_of(image: Image.Image) -> Look:
    """The look of a decoded picture, in any mode; only RGB is not converted first."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # A window that overlaps (unlike a box) hardly depends on how the sides divide: a copy of half the size stays alike.
    small = rgb.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=2.0)
    pixels = np.asarray(small, np.float64)
    bits = (_COSINES @ (pixels @ _BRIGHTNESS) @ _COSINES.T) > _THRESHOLD
    bits[0, 0] = False  # brightness is a matter of the colours
    columns = (_CELLS @ pixels.reshape(SIDE, SIDE * 3)).reshape(GRID, SIDE, 3)
    means = np.floor(_CELLS @ columns / SIDE**2 + 0.5)  # [row, column, channel]
    return Look(int.from_bytes(np.packbits(bits).tobytes()), means.astype(np.uint8).tobytes())


def similar(one: Look, other: Look, distance: int) -> bool:
    """Whether two pictures look alike.

    Args:
        one: a look.
        other: another.
        distance: bits in which their hashes may differ; colours may by :data:`COLOUR_TOLERANCE`.
    """
    if (one.phash ^ other.phash).bit_count() > distance:
        return False
    return all(abs(a - b) <= COLOUR_TOLERANCE for a, b in zip(one.colours, other.colours, strict=True))


def buckets(look: Look) -> tuple[bytes, bytes, bytes]:
    """What a picture shares with those that look alike, from coarse to fine; the last is the look itself.

    Equal pixels have one look. Of copies that lost something, 1.2% are in another coarse bucket (JPEG at quality 70
    1.1%, at 90 0.7%, WebP 1.5%, half the size 0.8%): it has only the signs of the 12 lowest frequencies, and the mean
    colour in steps of 32 whose edges lie beside black, white and the middle. The fine one has the 24 lowest.
    """
    cells = GRID**2
    steps = bytes(
        (sum(look.colours[channel::3]) + cells * _COLOUR_SHIFT) // (cells * _COLOUR_STEP) for channel in range(3)
    )
    coarse, fine = ((look.phash & mask).to_bytes(8) + steps for mask in _BUCKETS)
    return coarse, fine + b"+", look.data  # the two differ where no bit is set, too
