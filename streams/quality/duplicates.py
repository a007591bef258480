"""Finding samples that are there already: the same content, or the same look with the same words.

The index is held in memory, some 300 bytes a sample, and follows the store by reading new fragments only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import imagehash
from PIL import Image

from ops.digests import digest_bytes
from streams.rows import Snapshot
from streams.store import SampleStore

Kind = Literal["exact", "perceptual"]
Words = tuple[str, str, str]  # text, question, answer


@dataclass(frozen=True, slots=True)
class Twin:
    """Why a sample is a duplicate, and of which sample."""

    kind: Kind
    id: str


def phash(image: Image.Image) -> str:
    """Perceptual hash of an RGB image: the signs of its 8x8 lowest DCT coefficients. 16 hex digits."""
    return str(imagehash.phash(image))


class Looks:
    """Samples to compare with."""

    def __init__(self, distance: int = 0) -> None:
        """``distance``: bits in which the perceptual hashes of twins may differ; 0 wants equal hashes."""
        self.distance = distance
        self._ids: set[bytes] = set()
        self._looks: dict[bytes, dict[int, bytes]] = {}  # words -> perceptual hash -> id

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, sample_id: str, look: str, words: Words) -> None:
        """Remember a sample."""
        key = bytes.fromhex(sample_id)
        self._ids.add(key)
        self._looks.setdefault(_words_key(words), {}).setdefault(int(look, 16), key)

    def twin(self, sample_id: str, look: str, words: Words) -> Twin | None:
        """The sample that this one repeats, if any. Different words are never twins, however alike the images."""
        if bytes.fromhex(sample_id) in self._ids:
            return Twin("exact", sample_id)
        looks = self._looks.get(_words_key(words), {})
        value = int(look, 16)
        if value in looks:
            return Twin("perceptual", looks[value].hex())
        if self.distance:
            for other, key in looks.items():
                if (value ^ other).bit_count() <= self.distance:
                    return Twin("perceptual", key.hex())
        return None


class StoredLooks(Looks):
    """The samples of a store, as of the last :meth:`follow`."""

    def __init__(self, store: SampleStore, distance: int = 0) -> None:
        super().__init__(distance)
        self.store = store
        self._fragments: set[int] = set()

    def follow(self, snapshot: Snapshot) -> None:
        """Take in what the snapshot holds beyond what is known."""
        for number, table in self.store.identities(snapshot, self._fragments):
            for row in table.to_pylist():
                self.add(row["id"], row["phash"], (row["text"], row["question"], row["answer"]))
            self._fragments.add(number)


def _words_key(words: Words) -> bytes:
    return bytes.fromhex(digest_bytes(*(word.encode() for word in words))[:32])
