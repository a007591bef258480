"""All items of a suite's data that no candidate trains on, asked as the suite asks its own draw of them.

These are the suite's own, and those reserved from the domain's training split (training_data). The gate of a redrawn
item set asks some of them, and the others, which it never sees, decide what is true. The base was trained on the
training split of its own domains: there all sides have seen the reserved items once, and no candidate saw them again.

The difficulty of finding a text depends on the number of alternatives. So the items are divided into galleries as large
as the suite: the first is the suite's own draw, and each item is asked in one gallery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.training_data import reserved
from core.digests import digest_json
from streams.publish.folders import read_folder
from updater.gate.score import Scorer
from updater.gate.suite_items import Item, in_order_of_draw
from updater.gate.suites import Suite

LIMIT = 50_000
"""Of a suite that asks everything."""
MOST = 2000
"""Items of a population: 12 s at 6 ms an image, once; the truth of a suite is then known to about half a point."""
SHOWN = 2 / 3
"""Largest share of a population that is shown to a gate: a suite without reserved items is divided."""
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
    held_out: int
    """Items that the suite has in service: the first of every array of outcomes."""

    @classmethod
    def of(cls, suite: Suite, texts: Mapping[str, str] | None = None) -> Population:
        """``texts``: other captions, by the name of a picture's file. Raises GateError when the suite's data are
        missing."""
        own_items = _whole(suite).items()
        known = {item.id for item in own_items}
        rest = [item for item in _reserved(suite) if item.id not in known]
        order = [*in_order_of_draw(own_items, suite.seed), *in_order_of_draw(rest, suite.seed)][:MOST]
        if texts is not None:
            order = [replace(item, text=texts[PurePath(item.name).name]) for item in order]
        galleries = []
        for start in range(0, len(order), suite.limit):
            own = {item.id for item in order[start : start + suite.limit]}
            first = max(0, min(start, len(order) - suite.limit))  # the last one is filled up with earlier items
            items = sorted(order[first : first + suite.limit], key=lambda item: item.id)
            gallery = suite.model_copy()
            gallery._items, gallery._digest, gallery._home = tuple(items), None, None  # no home: scores are not kept
            galleries.append(Gallery(gallery, np.array([item.id in own for item in items])))
        return cls(suite, tuple(galleries), min(len(own_items), MOST))

    @property
    def shown(self) -> int:
        """Items of a redrawn set: as many as in service, if enough remain to determine the truth."""
        return min(self.held_out, int(SHOWN * self.n))

    @property
    def n(self) -> int:
        return sum(int(gallery.counted.sum()) for gallery in self.galleries)

    @property
    def digest(self) -> str:
        return digest_json([[self.suite.name, str(self.suite.metric)], list(self._ids())])

    def _ids(self) -> Iterator[list[str]]:
        for gallery in self.galleries:
            yield [item.id for item in gallery.suite.items()]

    def ranks(self, scorer: Scorer, adapter: str | None) -> Ranks:
        """One model's outcomes: [n, views]."""
        parts = [scorer.score(g.suite, adapter).ranks[g.counted] for g in self.galleries]
        return np.concatenate(parts)


def _reserved(suite: Suite) -> list[Item]:
    if suite.split is None:
        return []
    train = _whole(suite, split="train")
    names = {
        row.path.relative_to(suite.folder).as_posix() for row in read_folder(suite.folder, "train") if reserved(row)
    }
    return [item for item in train.items() if item.name in names]


def _whole(suite: Suite, **changes: str) -> Suite:
    whole = suite.model_copy(update={"limit": LIMIT, **changes})
    whole._items = whole._digest = None
    return whole
