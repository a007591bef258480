"""The ids of the corpus in memory: about 160 bytes for each of them, and two more for each space.

>>> ids = CorpusIds()
>>> ids.add(["00" * 32, "ff" * 32])
>>> ids.names(ids.numbers(["ff" * 32]))[0][:4]
'ffff'
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
GROWTH: Final = 1.5
LEAST_LENGTH: Final = 1024


class Flags:
    """Booleans by number, false where none was set; grows with the numbers."""

    def __init__(self) -> None:
        self._values = np.zeros(LEAST_LENGTH, np.bool_)

    def upto(self, end: int) -> npt.NDArray[np.bool_]:
        """Those of the numbers below ``end``, as a view that may be written."""
        if end > len(self._values):
            grown = np.zeros(int(end * GROWTH), np.bool_)
            grown[: len(self._values)] = self._values
            self._values = grown
        return self._values[:end]


class CorpusIds:
    """Sample ids in the order of ingestion. Each has a number, the next one, which no other ever gets."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._names: list[bytes] = []
        self._wanted = Flags()
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, sample: str) -> bool:
        return bytes.fromhex(sample) in self._numbers

    @property
    def end(self) -> int:
        """All numbers are below this one."""
        return len(self._names)

    @property
    def unreadable(self) -> int:
        """Samples that can never be embedded."""
        return len(self._unreadable)

    def wanted(self) -> npt.NDArray[np.bool_]:
        """By number: whether the sample is in the corpus and can be embedded."""
        return self._wanted.upto(self.end)

    def add(self, samples: Iterable[str]) -> None:
        """Add those that are not there yet, in this order."""
        first = self.end
        for sample in samples:
            name = bytes.fromhex(sample)
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        self._wanted.upto(self.end)[first:] = True

    def remove(self, samples: Iterable[str]) -> None:
        """Take samples out, unreadable ones too; unknown ones are passed over."""
        wanted = self.wanted()
        for sample in samples:
            number = self._numbers.pop(bytes.fromhex(sample), None)
            if number is not None:
                wanted[number] = False
                self._unreadable.discard(number)

    def leave_out(self, samples: Iterable[str]) -> None:
        """Samples of the corpus that can never be embedded."""
        numbers = self.numbers(samples)
        self.wanted()[numbers] = False
        self._unreadable.update(numbers.tolist())

    def numbers(self, samples: Iterable[str]) -> Numbers:
        """Of those samples that are in the corpus."""
        known = (self._numbers.get(bytes.fromhex(sample)) for sample in samples)
        return np.fromiter((number for number in known if number is not None), np.int64)

    def names(self, numbers: Sequence[int] | Numbers) -> list[str]:
        """The samples with these numbers."""
        return [self._names[number].hex() for number in numbers]
