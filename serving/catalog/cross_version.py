"""Searches in a space that is still being embedded: rows are found by the vectors of the space before it.

Only where a verdict says that new queries find old vectors as well as old queries did. What is found is ranked again
by the new vectors, as far as there are some. Scores of both kinds do not mean the same: the same row scores lower by
its old vector. So scores by old vectors are shifted by the mean difference over the rows that have both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from core.errors import LedgerError
from core.ledger import Ledger
from serving.catalog.queries import Filters, Hit
from serving.releases.types import ReleaseSnapshot

if TYPE_CHECKING:
    from serving.catalog.tables import Tables


CANDIDATES: Final = 4
"""So many times the asked number of rows are found by old vectors, and ranked again."""
LEAST_PAIRS: Final = 3
"""Rows with both vectors from which on their mean difference is used."""

log = logging.getLogger("ratchet.catalog")
_MOST_SPACES: Final = 64


def search_across(
    tables: Tables, new: str, old: str, vector: npt.NDArray[np.float32], k: int, filters: Filters
) -> tuple[list[Hit], list[str]]:
    """The ``k`` nearest rows to a query of the space ``new``, best first; and those found that have no new vector yet.

    Raises StoreError where the spaces have different dimensions.
    """
    by_old = tables.search(old, vector, CANDIDATES * k, filters)
    by_new = {hit.id: hit for hit in tables.search(new, vector, k, filters)}
    missing_score = [hit.id for hit in by_old if hit.id not in by_new]
    scores = {hit.id: hit.score for hit in by_new.values()} | tables.scores(new, vector, missing_score)
    hits = rank_across(by_old, scores)
    known = {hit.id for hit in hits}
    hits += [hit for hit in by_new.values() if hit.id not in known]
    best = sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]
    return best, [hit.id for hit in best if hit.id not in scores]


def rank_across(by_old: Sequence[Hit], scores: Mapping[str, float]) -> list[Hit]:
    """Hits by old vectors with their scores by new ones, or shifted where there is none; best first."""
    pairs = [scores[hit.id] - hit.score for hit in by_old if hit.id in scores]
    shift = float(np.mean(pairs)) if len(pairs) >= LEAST_PAIRS else 0.0
    hits = [replace(hit, score=scores.get(hit.id, min(1.0, hit.score + shift))) for hit in by_old]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))


def usable(cross_version: Mapping[str, str], space: str, complete: Collection[str]) -> str | None:
    """The space by whose vectors a space is searched; None: by its own."""
    old = cross_version.get(space)
    return old if old in complete and space not in complete else None


class CrossVersionVerdicts:
    """Reads what the gate measured, and remembers the image spaces of releases, by which their incumbents are known."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spaces: dict[str | None, str] = {}

    def remember(self, window: Sequence[ReleaseSnapshot]) -> None:
        """Releases that are resident."""
        self._spaces.update({snapshot.clip: snapshot.image_space for snapshot in window})
        for clip in list(self._spaces)[:-_MOST_SPACES]:
            del self._spaces[clip]

    async def read(self, snapshots: Sequence[ReleaseSnapshot], complete: Collection[str]) -> dict[str, str]:
        """By image space of those that are not complete: the space by whose vectors it may be searched until then."""
        cross_version: dict[str, str] = {}
        for snapshot in snapshots:
            if snapshot.clip is None or snapshot.image_space in complete:
                continue
            try:
                old = await asyncio.to_thread(self._space_before, snapshot.clip)
            except LedgerError as error:
                log.warning("the verdict on %s cannot be read: %s", snapshot.clip, error)
                continue
            if old is not None:
                cross_version[snapshot.image_space] = old
        return cross_version

    def _space_before(self, clip: str) -> str | None:
        verdict = self._ledger.verdict_on(clip)
        measured = None if verdict is None else verdict.summary.get("cross_version")
        if not measured or not measured["allowed"]:
            return None
        return self._spaces.get(measured["incumbent"])
