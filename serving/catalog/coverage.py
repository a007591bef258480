"""The ids of the corpus in memory, and which of them one image space holds or still lacks.

About 160 bytes for each id, and two more for each space.

>>> ids = CorpusIds()
>>> ids.add(["00" * 32, "ff" * 32])
>>> ids.names(ids.numbers(["ff" * 32]))[0][:4]
'ffff'
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
GROWTH: Final = 1.5
LEAST_LENGTH: Final = 1024

QUEUE_ROWS: Final = 8192
"""Missing rows that are looked up at once: a look goes over the whole corpus, 2 ms for a million rows."""
RATE_SECONDS: Final = 60.0
"""The rate of a backfill is that of the last minute."""


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


class SpaceCoverage:
    """Which rows of the corpus are in the table of one space, and which are being embedded for it."""

    def __init__(self, ids: CorpusIds) -> None:
        self._ids = ids
        self._held = Flags()
        self._taken = Flags()
        self._queue: deque[int] = deque()
        self.taken = 0
        """Rows between :meth:`take` and :meth:`hold` or :meth:`give_back`."""

    @property
    def rows(self) -> int:
        """Rows of the corpus that are in the table."""
        return int(np.count_nonzero(self._held.upto(self._ids.end)))

    @property
    def missing(self) -> int:
        """Rows that are not there yet and can be embedded."""
        return int(np.count_nonzero(self._ids.wanted() & ~self._held.upto(self._ids.end)))

    @property
    def ratio(self) -> float:
        """Share of the corpus that is done, 0 to 1; what cannot be embedded counts as done."""
        return min(1.0, (self.rows + self._ids.unreadable) / len(self._ids)) if len(self._ids) else 1.0

    def take(self, count: int) -> Numbers:
        """The next missing rows, the oldest first, marked as being embedded. Empty when none is left."""
        if not self._queue:
            end = self._ids.end
            lacks = self._ids.wanted() & ~self._held.upto(end) & ~self._taken.upto(end)
            self._queue.extend(np.flatnonzero(lacks)[:QUEUE_ROWS].tolist())
        wanted, held = self._ids.wanted(), self._held.upto(self._ids.end)
        taken = self._taken.upto(self._ids.end)
        numbers: list[int] = []
        while self._queue and len(numbers) < count:
            number = self._queue.popleft()
            if wanted[number] and not held[number] and not taken[number]:
                numbers.append(number)
                taken[number] = True
        self.taken += len(numbers)
        return np.asarray(numbers, np.int64)

    def prefer(self, numbers: Numbers) -> None:
        """Rows that searches came upon: if they are missing, they are the next ones to take."""
        self._queue.extendleft(numbers.tolist())

    def give_back(self, numbers: Numbers) -> None:
        """Rows that were taken are not being embedded any more, whether they are held by now or not."""
        self._taken.upto(self._ids.end)[numbers] = False
        self.taken -= len(numbers)

    def hold(self, numbers: Numbers) -> None:
        """Rows that are in the table."""
        self._held.upto(self._ids.end)[numbers] = True

    def holding(self, numbers: Numbers) -> Numbers:
        """Those of some rows that are in the table."""
        return numbers[self._held.upto(self._ids.end)[numbers]]

    def drop(self, numbers: Numbers) -> None:
        """Rows that left the table."""
        self._held.upto(self._ids.end)[numbers] = False

    def held(self) -> Numbers:
        """The numbers of all rows that are in the table, in the order of ingestion."""
        return np.flatnonzero(self._held.upto(self._ids.end)).astype(np.int64)


class BackfillRate:
    """Rows a second of one space's backfill, over the last minute in which it ran."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._rows: deque[tuple[float, int]] = deque([(now(), 0)])

    def begin(self) -> None:
        """Rows are being embedded: after a pause, what was before it says nothing of the rate."""
        if self._now() - self._rows[-1][0] > RATE_SECONDS:
            self._rows = deque([(self._now(), 0)])

    def add(self, rows: int) -> None:
        """Rows were embedded and stored."""
        now = self._now()
        self._rows.append((now, rows))
        while len(self._rows) > 2 and now - self._rows[0][0] > RATE_SECONDS:
            self._rows.popleft()

    @property
    def per_second(self) -> float:
        """0 while nothing is known."""
        began, ended = self._rows[0][0], self._rows[-1][0]
        rows = sum(count for _, count in list(self._rows)[1:])
        return rows / (ended - began) if ended > began else 0.0

    def seconds_left(self, missing: int) -> float | None:
        """An estimate; None while nothing is known."""
        if not missing:
            return 0.0
        return missing / self.per_second if self.per_second > 0 else None
