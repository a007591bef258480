"""Which releases and adapters stay loaded: the rollback window, and what a rollback of one family alone brings back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ops.ledger.ledger import Ledger
from ops.ledger.rows import ReleaseRow
from serving.releases.release_snapshot import ReleaseSnapshot

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
    behind: ReleaseRow | None
    """What a rollback of CLIP alone goes back to, where it is not in the window."""
    vlms: tuple[str | None, ...]
    """VLM adapters, the live one first. Never more different ones than the window has places."""

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        rows = self.window if self.behind is None else (*self.window, self.behind)
        return tuple(dict.fromkeys(row.clip for row in rows))

    @property
    def answering(self) -> tuple[ReleaseRow, ...]:
        """What answers requests that name no release: the live one and, beside a canary or a shadow, the stable one."""
        stable = next((row for row in self.window if row.plain), None)
        return self.window[:1] if stable is None or self.window[0].plain else (self.window[0], stable)


@dataclass(frozen=True, slots=True)
class Residency:
    """The same with stamps: what replicas are told."""

    window: tuple[ReleaseSnapshot, ...]
    """Newest first: requests may name these."""
    indexed: tuple[ReleaseSnapshot, ...]
    """The window and what is behind it: the catalog keeps their image spaces complete."""
    vlms: tuple[str | None, ...]

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        return tuple(dict.fromkeys(stamp.clip for stamp in self.indexed))


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
    behind = None
    if all(row.clip == live.clip for row in window):
        behind = ledger.before("clip", live.clip)
    vlms = dict.fromkeys(row.vlm for row in window)
    if len(vlms) == 1 and (other := ledger.before("vlm", live.vlm)) is not None:
        vlms[other.vlm] = None
    return ResidencyRows(tuple(window), behind, tuple(vlms))


async def resolve_residency(rows: ResidencyRows, spaces: Spaces) -> Residency:
    """Put spaces to the rows. What cannot be served is left out; nothing is resident when that answers requests."""
    window: list[ReleaseSnapshot] = []
    answering = {row.number for row in rows.answering}
    for row in rows.window:
        found = await spaces(row.clip)
        if found is not None:
            window.append(ReleaseSnapshot(row.number, row.clip, *found, row.vlm, row.share))
        elif row.number in answering:
            return Residency((), (), rows.vlms)
    indexed = list(window)
    if rows.behind is not None and (found := await spaces(rows.behind.clip)) is not None:
        indexed.append(ReleaseSnapshot(rows.behind.number, rows.behind.clip, *found, rows.behind.vlm))
    return Residency(tuple(window), tuple(indexed), rows.vlms)
