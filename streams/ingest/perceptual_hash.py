"""Perceptual hashes of images, robust to re-encoding, and the split that is based on them.

An image is scaled once, to 32x32. Its **perceptual hash** is the signs of the 8x8 lowest DCT coefficients of its
brightness, as in pHash (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010). A
coefficient is positive only above a quarter of a grey level: in plain or symmetric parts many are zero, and noise would
decide their signs. Its **colours** are the means of a 3x3 grid, because the hash ignores them. All arithmetic is on
whole numbers (in float64, which holds them exactly), so that results are the same on every machine.

**Near duplicates** are found without comparing all pairs: a hash is cut into ``distance + 1`` bands, and two hashes
that differ in fewer bits than there are bands agree in one of them (pigeonhole; Norouzi et al., Fast Exact Search in
Hamming Space, 2012). A band's number is made of its bits and of the sample's words.

**The split** keeps look-alikes together while they are few. A bucket is the images that agree in the coarse bits
(:func:`buckets`); it takes the side of its first image until :data:`FEW` are in it. Beyond that finer bits decide.
Images with one hash always have one side. New buckets are assigned so that each group of samples, those of one domain
with a text or with a question, gets its share: by a keyed hash, unless the group is off by :data:`TOLERANCE` samples (a
big stick design: Soares and Wu, "Some restricted randomization rules in sequential clinical trials", 1983). The state
is in tables of the duplicate index. Names are keyed hashes, which reveal nothing of an image.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from streams.store.rows import Split

SIDE: Final = 32
GRID: Final = 3
COLOUR_TOLERANCE: Final = 16
"""Largest difference of a cell's channel, of 255, between images that look alike. Measured over 670 images of seven
kinds (emoji, flags, clothes, photographs, drawings, crops of photographs, pages): JPEG at quality 70 changes it by at
most 8, at 90 by 6, WebP at 80 by 6, half the size by 3, and half the size as JPEG by 11. An object in a clearly
different colour is noticed if it fills a tenth of a cell."""
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
    """[3, 32]: overlap, in thirds of a pixel, of each column with each third of the image. Rows sum to 32."""
    edges = np.arange(GRID + 1) * SIDE
    pixels = np.arange(SIDE) * GRID
    overlap: npt.NDArray[np.int64] = np.minimum(edges[1:, None], pixels + GRID) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, GRID).astype(np.float64)


_COSINES = _cosines()
_CELLS = _cells()
_BRIGHTNESS = np.array([299.0, 587.0, 114.0])
_THRESHOLD = _DEAD_ZONE * SIDE * _SCALE**2 * 1000
"""In an orthonormal transform an amplitude of one level is a coefficient of 32."""
_LOWEST = sorted(
    ((i, j) for i in range(8) for j in range(8) if i or j), key=lambda index: (index[0] ** 2 + index[1] ** 2, index)
)

HASH_BYTES: Final = 8 + 3 * GRID**2
_COLOUR_STEP: Final = 32
_COLOUR_SHIFT: Final = 5
_BUCKETS: Final = [sum(1 << (63 - (8 * i + j)) for i, j in _LOWEST[:bits]) for bits in (12, 24)]


@dataclass(frozen=True, slots=True)
class PerceptualHash:
    phash: int
    """64 bits, row by row of the 8x8, highest first; the first, mean brightness, is never set."""
    colours: bytes
    """27 bytes: the mean R, G and B of each cell of a 3x3 grid, row by row."""

    @property
    def data(self) -> bytes:
        """:data:`HASH_BYTES` bytes: the hash in 8, big-endian, then the colours."""
        return self.phash.to_bytes(8, "big") + self.colours

    @classmethod
    def parse(cls, data: bytes) -> PerceptualHash:
        """The inverse of :attr:`data`. Raises ValueError."""
        if len(data) != HASH_BYTES:
            raise ValueError(f"{data[:100]!r} is not a perceptual hash: it lacks {HASH_BYTES} bytes")
        return cls(int.from_bytes(data[:8], "big"), data[8:])


def perceptual_hash(image: Image.Image) -> PerceptualHash:
    """Hash a decoded image in any mode; modes other than RGB are converted first."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # An overlapping window (unlike a box) hardly depends on how the sides divide, so a copy of half the size stays
    # alike.
    small = rgb.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=2.0)
    pixels = np.asarray(small, np.float64)
    bits = (_COSINES @ (pixels @ _BRIGHTNESS) @ _COSINES.T) > _THRESHOLD
    bits[0, 0] = False  # the colours cover brightness
    columns = (_CELLS @ pixels.reshape(SIDE, SIDE * 3)).reshape(GRID, SIDE, 3)
    means = np.floor(_CELLS @ columns / SIDE**2 + 0.5)  # [row, column, channel]
    return PerceptualHash(int.from_bytes(np.packbits(bits).tobytes()), means.astype(np.uint8).tobytes())


def similar(one: PerceptualHash, other: PerceptualHash, distance: int) -> bool:
    """True if two images look alike: their hashes differ in at most ``distance`` bits, and colours by
    :data:`COLOUR_TOLERANCE`."""
    if (one.phash ^ other.phash).bit_count() > distance:
        return False
    return all(abs(a - b) <= COLOUR_TOLERANCE for a, b in zip(one.colours, other.colours, strict=True))


def buckets(look: PerceptualHash) -> tuple[bytes, bytes, bytes]:
    """Bucket names that similar images share, from coarse to fine; the last is the hash itself. Equal pixels have one
    hash. Of lossy copies, 1.2% are in another coarse bucket (JPEG at quality 70 1.1%, at 90 0.7%, WebP 1.5%, half the
    size 0.8%): it only uses the signs of the 12 lowest frequencies, and the mean colour in steps of 32 whose edges are
    near black, white and the middle. The fine bucket uses the 24 lowest."""
    cells = GRID**2
    steps = bytes(
        (sum(look.colours[channel::3]) + cells * _COLOUR_SHIFT) // (cells * _COLOUR_STEP) for channel in range(3)
    )
    coarse, fine = ((look.phash & mask).to_bytes(8) + steps for mask in _BUCKETS)
    return coarse, fine + b"+", look.data  # the suffix keeps them different even if no bit is set


_ALL_BITS: Final = 2**64 - 1
_SIGN: Final = 2**63
"""SQLite's integers are signed."""
_ODD: Final = 0x9E3779B97F4A7C15
_NO_PHASH: Final = bytes(8)


def masks(distance: int) -> list[int]:
    """One 64-bit mask per band; together they cover each bit once. Empty for a negative distance."""
    ends = [64 * number // (distance + 1) for number in range(distance + 2)] if distance >= 0 else []
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(ends)]


def bands_of(phash: int, words: int, masks: Sequence[int]) -> list[int]:
    return [((words + (phash & mask) * _ODD + number) & _ALL_BITS) - _SIGN for number, mask in enumerate(masks)]


def bands_of_all(looks: Sequence[bytes | None], words: npt.NDArray[Any], masks: Sequence[int]) -> Iterator[list[int]]:
    """Yield each band's numbers for all hashes, as by :func:`bands_of`; arbitrary for None. ``looks`` each start with
    the 8 bytes of the hash, big-endian; ``words``: [N], int64."""
    phashes = np.frombuffer(b"".join((look or _NO_PHASH)[:8] for look in looks), ">u8").astype(np.uint64)
    for number, mask in enumerate(masks):
        with np.errstate(over="ignore"):
            hashes = (phashes & np.uint64(mask)) * np.uint64(_ODD)
            numbers = words.astype(np.uint64) + hashes + np.uint64(number) - np.uint64(_SIGN)
        yield numbers.view(np.int64).tolist()


FEW: Final = 4
"""Images of a bucket that stay together: an original with its copies in other sizes and encodings."""
TOLERANCE: Final = 2.0
"""Held-out samples by which a group may be off its share when a bucket is assigned. Later members of the bucket can
increase that: over 300 samples of one kind the share is 0.14 to 0.18."""
MOST_OWED: Final = 30.0
"""Bound on the held-out samples that a group catches up on. It keeps a changed share, or an earlier version's one-sided
samples, from causing a long run of the other side."""
COLUMNS: Final = ("coarse", "fine", "exact", "grp")
TABLES: Final = (
    "CREATE TABLE sides (name INTEGER PRIMARY KEY, held INTEGER, seen INTEGER);"
    "CREATE TABLE owed (name INTEGER PRIMARY KEY, held REAL);"
)


@dataclass(frozen=True, slots=True)
class SplitRule:
    key: bytes = b""
    """The installation's secret, so that no producer can choose a side by computing it."""
    share: float = 0.0

    def columns(self, look: bytes | None, domain: str, asks: bool) -> tuple[int | None, ...]:
        """Values of :data:`COLUMNS` for a sample. Without a ``look`` (:attr:`PerceptualHash.data`) it only counts in
        its group. ``asks``: it has a question."""
        names = (None, None, None) if look is None else map(self._name, buckets(PerceptualHash.parse(look)))
        return *names, self._name(f"{asks:d} {domain}".encode())

    def assign(self, db: sqlite3.Connection, columns: Sequence[int | None]) -> Split:
        """Choose the side of a new sample by its :meth:`columns`, and count it."""
        held = self._decide(db, *columns)
        rows = [(name, held) for name in columns[:3] if name is not None]
        db.executemany("INSERT INTO sides VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET seen = seen + 1", rows)
        _owe(db, "VALUES (?, ?)", (columns[3], self.share - held))
        return "fresh_eval" if held else "train"

    def _decide(
        self, db: sqlite3.Connection, coarse: int | None, fine: int | None, exact: int | None, group: int | None
    ) -> bool:
        found = db.execute("SELECT name, held, seen FROM sides WHERE name IN (?, ?, ?)", (coarse, fine, exact))
        known = {name: (bool(held), seen) for name, held, seen in found}
        if exact in known:
            return known[exact][0]
        for name in (fine, coarse):
            held, seen = known.get(name, (False, FEW))
            if seen < FEW:
                return held
        row = db.execute("SELECT held FROM owed WHERE name = ?", (group,)).fetchone()
        owed = 0.0 if row is None else row[0]
        if abs(owed) >= TOLERANCE:
            return bool(owed > 0)
        name = next((each for each in (coarse, fine) if each not in known), exact)
        return (name or 0) % 2**64 < self.share * 2**64

    def note_staged(self, db: sqlite3.Connection) -> None:
        new = "FROM staged WHERE NOT EXISTS (SELECT 1 FROM ids WHERE ids.id = staged.id)"
        for name in COLUMNS[:3]:
            db.execute(
                f"INSERT INTO sides SELECT {name}, max(held), count(*) {new} AND {name} IS NOT NULL GROUP BY {name}"
                f" ORDER BY {name} ON CONFLICT DO UPDATE SET seen = seen + excluded.seen"
            )
        _owe(db, f"SELECT grp, sum(? - held) {new} GROUP BY grp", (self.share,))

    def _name(self, data: bytes) -> int:
        return int.from_bytes(blake2b(data, key=self.key, person=b"split", digest_size=8).digest(), signed=True)


def _owe(db: sqlite3.Connection, values: str, parameters: Sequence[float | None]) -> None:
    """Add to the held-out samples that groups are owed: their share minus the actual number."""
    bounded = f"max(-{MOST_OWED}, min({MOST_OWED}, held + excluded.held))"
    db.execute(f"INSERT INTO owed {values} ON CONFLICT DO UPDATE SET held = {bounded}", parameters)
