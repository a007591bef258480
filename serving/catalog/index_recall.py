"""recall@10 of an index against exact search, for the queries that clients send and for stored vectors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from serving.catalog.queries import Filters
from serving.catalog.sample_digests import Keys
from serving.catalog.table_files import Neighbours

NEIGHBOURS: Final = 10
SAME: Final = 1e-5
"""Scores that differ by less are equal: rows with equal vectors may come in any order."""
EXACT: Final = 3 * NEIGHBOURS
"""Neighbours that are looked for exactly."""
RECENT: Final = 256

Vectors = npt.NDArray[np.float32]


class RecentQueries:
    """The last queries of each space. Texts are far from all images in CLIP's space, so that an index which finds the
    neighbours of images well may find those of texts badly.
    """

    def __init__(self) -> None:
        self._queries: dict[str, deque[Vectors]] = {}

    def add(self, space: str, vector: Vectors) -> None:
        """A client searched for this."""
        self._queries.setdefault(space, deque(maxlen=RECENT)).append(np.asarray(vector, np.float32))

    def sample(self, space: str, count: int, random: np.random.Generator) -> Sequence[Vectors]:
        """At most so many of them."""
        known = list(self._queries.get(space, ()))
        return [known[index] for index in random.permutation(len(known))[:count]]

    def forget_others(self, spaces: Sequence[str]) -> None:
        """Let go of the queries of all other spaces."""
        self._queries = {space: queries for space, queries in self._queries.items() if space in spaces}


@dataclass(frozen=True, slots=True)
class RecallQuestion:
    """Queries [n, dim] under one condition, with the exact neighbours of each: more than :data:`NEIGHBOURS`, because of
    equal scores, and because rows come and go while recall is measured.
    """

    vectors: Vectors
    filters: Filters
    exact: Sequence[Neighbours]


def recall_of(keys: Keys, exact: Neighbours, newer: int = 0) -> float:
    """Share of the nearest rows that were found: a hit is right when its exact score is that of the last of them, or
    better. The score that comes with it does not count: an index rounds it.

    Args:
        keys: of the hits.
        newer: further hits, that were not there when the neighbours were looked for.
    """
    count = min(NEIGHBOURS - newer, len(exact.scores))
    if count <= 0:
        return 1.0
    right = exact.keys[exact.scores >= exact.scores[count - 1] - SAME]
    return float(np.isin(keys[:count], right).sum()) / count
