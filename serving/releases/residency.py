"""Which releases and adapters stay loaded: the rollback window, and what a rollback of one family alone brings back."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from core import metrics
from core.errors import RatchetError, ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from serving.own_threads import OwnThreads
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import Prepared, Residency

log = logging.getLogger("ratchet.residency")
Spaces = Callable[[str | None], Awaitable[tuple[str, str] | None]]
"""Image and text space of a CLIP adapter; None when its files are gone or damaged. Raises RatchetError when no replica
can tell now."""
UNSERVABLE_SECONDS: Final = 5.0
"""How often an adapter whose files were gone or damaged is tried again."""


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


def read_residency(ledger: Ledger, size: int, base: str | None = None) -> ResidencyRows:
    """From the ledger: ``size`` releases, and for each family the newest other adapter. ``base``: only releases whose
    CLIP has this base (its digest).
    """
    with ledger.reading():
        return _read_residency(ledger, size, base)


def _read_residency(ledger: Ledger, size: int, base: str | None) -> ResidencyRows:
    newest = ledger.releases(size, base)
    if not newest:
        return ResidencyRows((), None, ())
    live = newest[0]
    incumbent = ledger.incumbent(live.number, base)
    first = {row.number: row for row in (live, incumbent) if row is not None}
    others = [row for row in newest if row.number not in first]
    window = sorted([*first.values(), *others[: size - len(first)]], key=lambda row: -row.number)
    rollback_release = ledger.before("clip", live.clip, base)
    if rollback_release is not None and rollback_release.clip in {row.clip for row in window}:
        rollback_release = None
    vlms = dict.fromkeys(row.vlm for row in window)
    if len(vlms) == 1 and (other := ledger.before("vlm", live.vlm, base)) is not None:
        vlms[other.vlm] = None
    return ResidencyRows(tuple(window), rollback_release, tuple(vlms))


async def resolve_residency(rows: ResidencyRows, spaces: Spaces) -> Residency:
    """Put spaces to the rows. Releases whose CLIP adapter is gone or damaged are left out, so that the newest one
    that can be loaded is served.

    Raises:
        RatchetError: the spaces of a release that answers requests are not known.
    """
    answering = {row.number for row in rows.answering}
    window = [
        ReleaseSnapshot(row.number, row.clip, *pair, row.vlm, row.share)
        for row in rows.window
        if (pair := await _spaces_or_none(row, spaces, row.number in answering)) is not None
    ]
    indexed = list(window)
    older = rows.rollback_release
    if older is not None and (pair := await _spaces_or_none(older, spaces, not window)) is not None:
        indexed.append(ReleaseSnapshot(older.number, older.clip, *pair, older.vlm))
    return Residency(tuple(window or indexed), tuple(indexed), rows.vlms)


async def _spaces_or_none(row: ReleaseRow, spaces: Spaces, needed: bool) -> tuple[str, str] | None:
    try:
        return await spaces(row.clip)
    except RatchetError:
        if needed:
            raise
        return None


class ResidencyReader:
    """Reads the newest releases; asks an encoder for the spaces of each adapter, once while it is resident
    (adapters never change)."""

    def __init__(
        self,
        read: Callable[[], ResidencyRows],
        prepare: Callable[[str | None], Awaitable[Prepared]],
        prepare_all: Callable[[str | None], Awaitable[Sequence[Prepared]]],
    ) -> None:
        """Args:
        read: what is resident; called in a thread. See :meth:`.residency_source.ResidencySource.newest`.
        prepare: asks any encoder to hold a CLIP adapter.
        prepare_all: asks all of them.
        """
        self._read = read
        self._threads = OwnThreads("residency")
        self._prepare = prepare
        self._prepare_all = prepare_all
        self._spaces: dict[str | None, tuple[str, str]] = {}
        self._gone: dict[str | None, float] = {}

    async def read(self, newer_than: int = 0) -> Residency | None:
        """What is resident; None when nothing newer can be served.

        Raises:
            RatchetError: neither the ledger nor a copy can be read, or no encoder can tell the spaces now.
        """
        rows = await self._threads.run(self._read)
        if not rows.window or rows.window[0].number <= newer_than:
            return None
        residency = await resolve_residency(rows, self._spaces_of)
        for clip in set(self._spaces).difference(rows.clips):
            del self._spaces[clip]
        newest = residency.window[0].release if residency.window else 0
        metrics.release.unservable("clip", newest < rows.window[0].number)
        return residency if newest > newer_than else None

    async def _spaces_of(self, clip: str | None) -> tuple[str, str] | None:
        if clip not in self._spaces:
            if time.monotonic() < self._gone.get(clip, 0.0):
                return None
            prepared = await self._prepare(clip)
            if prepared.unservable:  # there: another node may have a copy that is whole
                answers = await self._prepare_all(clip)
                prepared = next((answer for answer in answers if not answer.unservable), prepared)
            if prepared.unservable:
                log.error("%s cannot be served: %s", clip or "the base", prepared.error)
                self._gone[clip] = time.monotonic() + UNSERVABLE_SECONDS
                return None
            if prepared.error:
                raise ReleaseError(f"the spaces of {clip or 'the base'} are not known: {prepared.error}")
            self._gone.pop(clip, None)
            self._spaces[clip] = (prepared.image_space, prepared.text_space)
        return self._spaces[clip]
