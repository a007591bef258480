"""Searches an incomplete space with the help of the previous space's vectors. Used only if a verdict says that new
queries find old vectors as well as old queries did. Hits are ranked again by new vectors where they exist. The same row
scores lower by its old vector, so old scores are shifted by the mean difference over rows that have both."""

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
"""Multiple of the requested rows that are found by old vectors and ranked again."""
LEAST_PAIRS: Final = 3
"""Minimum rows with both vectors for the shift by their mean difference."""

log = logging.getLogger("ratchet.catalog")


def search_across(
    tables: Tables, new: str, old: str, vectors: npt.NDArray[np.float32], k: int, filters: Filters
) -> tuple[list[list[Hit]], list[str]]:
    """The ``k`` nearest rows to each of the unit vectors [n, dim] of the space ``new``, best first, and those that have
    no new vector yet. Raises StoreError when the spaces have different dimensions."""
    every_old = tables.search(old, vectors, CANDIDATES * k, filters)
    every_new = tables.search(new, vectors, k, filters)
    here = tables.vectors(new, sorted({hit.id for by_old in every_old for hit in by_old}))
    found, lacking = [], set[str]()
    for vector, by_old, by_new in zip(vectors, every_old, every_new, strict=True):
        scores = {hit.id: float(here[hit.id] @ vector) for hit in by_old if hit.id in here}
        scores |= {hit.id: hit.score for hit in by_new}
        hits = rank_across(by_old, scores)
        known = {hit.id for hit in hits}
        hits += [hit for hit in by_new if hit.id not in known]
        found.append(sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k])
        lacking.update(hit.id for hit in found[-1] if hit.id not in scores)
    return found, sorted(lacking)


def rank_across(by_old: Sequence[Hit], scores: Mapping[str, float]) -> list[Hit]:
    """Hits by old vectors, scored by new ones or shifted without one; best first."""
    pairs = [scores[hit.id] - hit.score for hit in by_old if hit.id in scores]
    shift = float(np.mean(pairs)) if len(pairs) >= LEAST_PAIRS else 0.0
    hits = [replace(hit, score=scores.get(hit.id, min(1.0, hit.score + shift))) for hit in by_old]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))


def usable(cross_version: Mapping[str, str], space: str, complete: Collection[str]) -> str | None:
    """The space whose vectors are used to search ``space``; None: its own."""
    old = cross_version.get(space)
    return old if old in complete and space not in complete else None


class CrossVersionVerdicts:
    """Reads the gate's cross-version verdicts; remembers releases' image spaces to find those of incumbents."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spaces: dict[str | None, str] = {}

    def remember(self, window: Sequence[ReleaseSnapshot]) -> None:
        self._spaces.update({snapshot.clip: snapshot.image_space for snapshot in window})
        for clip in list(self._spaces)[:-64]:  # more than the releases that can be resident
            del self._spaces[clip]

    async def read(self, snapshots: Sequence[ReleaseSnapshot], complete: Collection[str]) -> dict[str, str]:
        """For each incomplete image space, the space whose vectors may be searched until it is complete."""
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
        measured = self._ledger.cross_version(clip)
        if not measured or not measured["allowed"]:
            return None
        return self._spaces.get(measured["incumbent"])
