"""The look of a picture, in a few bytes that another encoding hardly changes; and what is decided by it.

A picture is scaled once, to 32x32. Its **perceptual hash** is the signs of the 8x8 lowest coefficients of the discrete
cosine transform of its brightness, as in pHash (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010). A coefficient counts as positive only above a quarter of a grey level: in pictures with plain or
symmetric parts many are zero, and noise would decide their signs. Its **colours** are the means of a 3x3 grid, because
the hash knows nothing of them: shirts in six colours have one hash, and all plain pictures have. All arithmetic is on
whole numbers (in float64, which holds them exactly), so that a picture has the same look on every machine.

**Near duplicates** are found without comparing with all: a hash is cut into ``distance + 1`` bands, and two hashes that
differ in fewer bits than there are bands agree in one of them (pigeonhole; Norouzi et al., Fast Exact Search in Hamming
Space, 2012). A band's number is made of its bits and of the words of the sample.

**The split**: look-alikes stay together while they are few. A bucket is what agrees in the coarse bits of a look
(:func:`buckets`); it takes the side of its first picture until :data:`FEW` are in it. Past that, as with the pictures
of one form, of one camera or of one colour, finer bits decide. Pictures of one look always have one side. New buckets
are assigned so that each group of samples, those of one domain with a text or with a question, has its share: by a
keyed hash, unless the group has :data:`TOLERANCE` samples too many or too few (a big stick design: Soares and Wu, "Some
restricted randomization rules in sequential clinical trials", 1983). The state is in tables of the duplicate index,
which are made again from what is stored: the side of a stored sample is the one in its row. Names are keyed hashes, so
the tables say nothing of a picture.
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

HASH_BYTES: Final = 8 + 3 * GRID**2
_COLOUR_STEP: Final = 32
_COLOUR_SHIFT: Final = 5
_BUCKETS: Final = [sum(1 << (63 - (8 * i + j)) for i, j in _LOWEST[:bits]) for bits in (12, 24)]


@dataclass(frozen=True, slots=True)
class PerceptualHash:
    """Shapes and colours of a picture."""

    phash: int
    """64 bits, row by row of the 8x8, the highest first; that one, of the mean brightness, is never set."""
    colours: bytes
    """27 bytes: the mean R, G and B of each cell of a 3x3 grid, row by row."""

    @property
    def data(self) -> bytes:
        """:data:`HASH_BYTES` bytes: the hash in 8, big-endian, then the colours."""
        return self.phash.to_bytes(8, "big") + self.colours

    @classmethod
    def parse(cls, data: bytes) -> PerceptualHash:
        """The look of which this is :attr:`data`. Raises ValueError."""
        if len(data) != HASH_BYTES:
            raise ValueError(f"{data[:100]!r} is no look: it has not {HASH_BYTES} bytes")
        return cls(int.from_bytes(data[:8], "big"), data[8:])


def perceptual_hash(image: Image.Image) -> PerceptualHash:
    """The look of a decoded picture, in any mode; only RGB is not converted first."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # A window that overlaps (unlike a box) hardly depends on how the sides divide: a copy of half the size stays alike.
    small = rgb.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=2.0)
    pixels = np.asarray(small, np.float64)
    bits = (_COSINES @ (pixels @ _BRIGHTNESS) @ _COSINES.T) > _THRESHOLD
    bits[0, 0] = False  # brightness is a matter of the colours
    columns = (_CELLS @ pixels.reshape(SIDE, SIDE * 3)).reshape(GRID, SIDE, 3)
    means = np.floor(_CELLS @ columns / SIDE**2 + 0.5)  # [row, column, channel]
    return PerceptualHash(int.from_bytes(np.packbits(bits).tobytes()), means.astype(np.uint8).tobytes())


def similar(one: PerceptualHash, other: PerceptualHash, distance: int) -> bool:
    """True if two pictures look alike.

    Args:
        one: a look.
        other: another.
        distance: bits in which their hashes may differ; colours may by :data:`COLOUR_TOLERANCE`.
    """
    if (one.phash ^ other.phash).bit_count() > distance:
        return False
    return all(abs(a - b) <= COLOUR_TOLERANCE for a, b in zip(one.colours, other.colours, strict=True))


def buckets(look: PerceptualHash) -> tuple[bytes, bytes, bytes]:
    """Names that a picture shares with those that look alike, from coarse to fine; the last is the look itself.

    Equal pixels have one look. Of copies that lost something, 1.2% are in another coarse bucket (JPEG at quality 70
    1.1%, at 90 0.7%, WebP 1.5%, half the size 0.8%): it has only the signs of the 12 lowest frequencies, and the mean
    colour in steps of 32 whose edges are near black, white and the middle. The fine one has the 24 lowest.
    """
    cells = GRID**2
    steps = bytes(
        (sum(look.colours[channel::3]) + cells * _COLOUR_SHIFT) // (cells * _COLOUR_STEP) for channel in range(3)
    )
    coarse, fine = ((look.phash & mask).to_bytes(8) + steps for mask in _BUCKETS)
    return coarse, fine + b"+", look.data  # the two differ where no bit is set, too


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


FEW: Final = 4
"""Pictures of a bucket that stay together: an original with its copies in other sizes and encodings."""
TOLERANCE: Final = 2.0
"""Held-out samples by which a group may be off its share when a bucket is assigned. Those that join it later can take
it further: over 300 samples of one kind the share is 0.14 to 0.18."""
MOST_OWED: Final = 30.0
"""Held-out samples that a group makes up for. A share that was changed, or samples of an earlier version that had one
side alone, are not made up for by a long stretch of the other."""
COLUMNS: Final = ("coarse", "fine", "exact", "grp")
"""Of :meth:`SplitRule.columns`."""
TABLES: Final = (
    "CREATE TABLE sides (name INTEGER PRIMARY KEY, held INTEGER, seen INTEGER);"
    "CREATE TABLE owed (name INTEGER PRIMARY KEY, held REAL);"
)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """The split of an installation."""

    key: bytes = b""
    """Secret of the installation, so that no producer can choose a side by computing it."""
    share: float = 0.0
    """Of the samples that are held out, from 0 to 1."""

    def columns(self, look: bytes | None, domain: str, asks: bool) -> tuple[int | None, ...]:
        """Values of :data:`COLUMNS` for a sample: its buckets, and its group.

        Args:
            look: :attr:`PerceptualHash.data`; None where there is none, which is counted in its group alone.
            domain: of the sample.
            asks: whether it has a question.
        """
        names = (None, None, None) if look is None else map(self._name, buckets(PerceptualHash.parse(look)))
        return *names, self._name(f"{asks:d} {domain}".encode())

    def assign(self, db: sqlite3.Connection, columns: Sequence[int | None]) -> Split:
        """Decide the side of a sample that is not stored yet, by its :meth:`columns`, and count it."""
        held = self._decide(db, *columns)
        rows = [(name, held) for name in columns[:3] if name is not None]
        db.executemany("INSERT INTO sides VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET seen = seen + 1", rows)
        _owe(db, "VALUES (?, ?)", (columns[3], self.share - held))
        return "fresh_eval" if held else "train"

    def _decide(
        self, db: sqlite3.Connection, coarse: int | None, fine: int | None, exact: int | None, group: int | None
    ) -> bool:
        """True if it is held out."""
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
        """Count the samples of the table ``staged``, with :data:`COLUMNS` and ``held``, that ``ids`` lacks yet."""
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
    """Add what some groups are owed: held-out samples by their share, less those that there are."""
    bounded = f"max(-{MOST_OWED}, min({MOST_OWED}, held + excluded.held))"
    db.execute(f"INSERT INTO owed {values} ON CONFLICT DO UPDATE SET held = {bounded}", parameters)
