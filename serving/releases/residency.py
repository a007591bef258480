"""Which releases and adapters stay loaded: the rollback window, and what a rollback of one family alone brings back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ops.ledger.ledger import Ledger
from ops.ledger.rows import Family, ReleaseRow
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import Prepared, Residency

log = logging.getLogger("ratchet.residency")
Spaces = Callable[[str | None], Awaitable[tuple[str, str] | None]]
"""Image and text space of a CLIP adapter; None when it cannot be served."""


@dataclass(frozen=True, slots=True)
class ResidencyRows:
    """What the ledger says is resident.

    The window alone would not do: after two releases of a VLM adapter, what a rollback of CLIP goes back to has left
    it, and the catalog would have to be embedded again first.
    """

    window: tuple[ReleaseRow, ...]
    """Newest first: requests may name them. The live release and its incumbent (what a canary leaves to answer, what
    a release is compared with, what a rollback goes back to), and the newest others that there is room for."""
    rollback_release: ReleaseRow | None
    """What a rollback of CLIP alone goes back to, where it is not in the window."""
    vlms: tuple[str | None, ...]
    """VLM adapters, the live one first. Never more different ones than the window has places."""

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        rows = self.window if self.rollback_release is None else (*self.window, self.rollback_release)
        return tuple(dict.fromkeys(row.clip for row in rows))

    @property
    def answering(self) -> tuple[ReleaseRow, ...]:
        """What answers requests that name no release: the live one and, beside a canary or a shadow, the stable one."""
        stable = next((row for row in self.window if row.plain), None)
        return self.window[:1] if stable is None or self.window[0].plain else (self.window[0], stable)

    def needed(self, family: Family) -> tuple[str | None, ...]:
        """Adapters without which requests cannot be answered; the base alone before the first release."""
        return tuple(dict.fromkeys(row.adapter(family) for row in self.answering)) or (None,)


def read_residency(ledger: Ledger, size: int) -> ResidencyRows:
    """From the ledger: ``size`` releases, and for each family the newest other adapter."""
    newest = ledger.releases(size)
    if not newest:
        return ResidencyRows((), None, ())
    live = newest[0]
    incumbent = ledger.incumbent(live.number)
    first = {row.number: row for row in (live, incumbent) if row is not None}
    others = [row for row in newest if row.number not in first]
    window = sorted([*first.values(), *others[: size - len(first)]], key=lambda row: -row.number)
    rollback_release = ledger.before("clip", live.clip)
    if rollback_release is not None and rollback_release.clip in {row.clip for row in window}:
        rollback_release = None
    vlms = dict.fromkeys(row.vlm for row in window)
    if len(vlms) == 1 and (other := ledger.before("vlm", live.vlm)) is not None:
        vlms[other.vlm] = None
    return ResidencyRows(tuple(window), rollback_release, tuple(vlms))


async def resolve_residency(rows: ResidencyRows, spaces: Spaces) -> Residency:
    """Put spaces to the rows. What cannot be served is left out; nothing is resident when that answers requests."""
    window: list[ReleaseSnapshot] = []
    answering = {row.number for row in rows.answering}
    for row in rows.window:
        pair = await spaces(row.clip)
        if pair is not None:
            window.append(ReleaseSnapshot(row.number, row.clip, *pair, row.vlm, row.share))
        elif row.number in answering:
            return Residency((), (), rows.vlms)
    indexed = list(window)
    older = rows.rollback_release
    if older is not None and (pair := await spaces(older.clip)) is not None:
        indexed.append(ReleaseSnapshot(older.number, older.clip, *pair, older.vlm))
    return Residency(tuple(window), tuple(indexed), rows.vlms)


class ResidencyReader:
    """Reads the newest releases; asks an encoder for the spaces of each adapter, once while it is resident
    (adapters never change)."""

    def __init__(self, ledger: Ledger, prepare: Callable[[str | None], Awaitable[Prepared]], size: int) -> None:
        """``prepare``: asks any encoder to hold a CLIP adapter."""
        self.ledger = ledger
        self._prepare = prepare
        self.size = size
        self._spaces: dict[str | None, tuple[str, str]] = {}

    async def read(self, newer_than: int = 0) -> Residency | None:
        """What is resident; None when nothing newer is live, or when the live adapter cannot be served."""
        rows = await asyncio.to_thread(read_residency, self.ledger, self.size)
        if not rows.window or rows.window[0].number <= newer_than:
            return None
        residency = await resolve_residency(rows, self._spaces_of)
        for clip in set(self._spaces).difference(rows.clips):
            del self._spaces[clip]
        return residency if residency.window else None

    async def _spaces_of(self, clip: str | None) -> tuple[str, str] | None:
        if clip not in self._spaces:
            prepared = await self._prepare(clip)
            if prepared.error:
                log.error("%s cannot be served: %s", clip or "the base", prepared.error)
                return None
            self._spaces[clip] = (prepared.image_space, prepared.text_space)
        return self._spaces[clip]
