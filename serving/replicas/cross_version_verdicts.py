"""Which image spaces may be searched before they are complete, by what the gate measured of their adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Final

from core.errors import LedgerError
from core.ledger import Ledger
from serving.releases.release_snapshot import ReleaseSnapshot

log = logging.getLogger("ratchet.catalog")
MOST_SPACES: Final = 64


class CrossVersionVerdicts:
    """Reads verdicts, and remembers the image spaces of releases, by which their incumbents are known."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._spaces: dict[str | None, str] = {}

    def remember(self, window: Sequence[ReleaseSnapshot]) -> None:
        """Releases that are resident."""
        self._spaces.update({snapshot.clip: snapshot.image_space for snapshot in window})
        for clip in list(self._spaces)[:-MOST_SPACES]:
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
