"""Which releases and adapters stay loaded: the rollback window, and what a rollback of one family alone brings back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.errors import RatchetError
from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import Residency

Spaces = Callable[[str | None], Awaitable[tuple[str, str] | None]]
"""Image and text space of a CLIP adapter; None when its files are gone or damaged. Raises RatchetError when no replica
can tell now."""


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
