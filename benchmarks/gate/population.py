"""All held-out items of a suite's data, asked as the suite asks its own draw of them.

How hard it is to find a text depends on how many there are to choose from. So the items are dealt out in galleries as
large as the suite: the first is the suite's own draw, and each item is asked in one gallery.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ops.digests import digest_json
from updater.gate.score import Scorer
from updater.gate.suite_items import in_order_of_draw
from updater.gate.suites import Suite

MOST = 50_000
Ranks = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Items that are answered together; those with ``counted`` are this gallery's own."""

    suite: Suite
    counted: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Population:
    """One suite and everything that it could have drawn."""

    suite: Suite
    galleries: tuple[Gallery, ...]

    @classmethod
    def of(cls, suite: Suite) -> Population:
        """Raises GateError when the suite's data are missing."""
        everything = suite.model_copy(update={"limit": MOST})
        everything._items = everything._digest = None
        order = in_order_of_draw(everything.items(), suite.seed)
        galleries = []
        for start in range(0, len(order), suite.limit):
            own = {item.id for item in order[start : start + suite.limit]}
            first = max(0, min(start, len(order) - suite.limit))  # the last one is filled up with earlier items
            items = sorted(order[first : first + suite.limit], key=lambda item: item.id)
            gallery = suite.model_copy()
            gallery._items, gallery._digest, gallery._home = tuple(items), None, None  # no home: scores are not kept
            galleries.append(Gallery(gallery, np.array([item.id in own for item in items])))
        return cls(suite, tuple(galleries))

    @property
    def drawn(self) -> int:
        """Items of the suite's own draw: the first so many of every array of outcomes."""
        return int(self.galleries[0].counted.sum())

    @property
    def n(self) -> int:
        """All items."""
        return sum(int(gallery.counted.sum()) for gallery in self.galleries)

    @property
    def digest(self) -> str:
        """Names the items and how they are dealt out."""
        return digest_json([[self.suite.name, str(self.suite.metric)], list(self._ids())])

    def _ids(self) -> Iterator[list[str]]:
        for gallery in self.galleries:
            yield [item.id for item in gallery.suite.items()]

    def ranks(self, scorer: Scorer, adapter: str | None) -> Ranks:
        """One model's outcomes: [n, views]."""
        parts = [scorer.score(g.suite, adapter).ranks[g.counted] for g in self.galleries]
        return np.concatenate(parts)
