"""Which releases a server can answer with: those whose CLIP has the server's base (``base.clip``).

A release of another base changes nothing for the servers that run: they go on with the newest one of theirs, until they
are replaced by servers that have the other base. What is live is changed by servers of the live release's base alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.digests import digest12
from core.errors import ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import ReleaseRow
from core.settings import Settings
from serving.engines.clip_base import base_of, digest_of, shown


@dataclass(frozen=True, slots=True)
class Lineage:
    """The base that a server has."""

    name: str
    digest: str
    home: Path

    @classmethod
    def of(cls, settings: Settings) -> Lineage | None:
        """That of the settings; None where no such base is registered (a process that loads none)."""
        digest = digest_of(settings.home, settings.base.clip)
        return None if digest is None else cls(settings.base.clip, digest, settings.home)

    def has(self, release: ReleaseRow | None) -> bool:
        """Whether a release's CLIP has this base. One that names no base is of the only one that there was."""
        return release is None or release.clip_base in (None, self.digest)

    def why_not(self, release: ReleaseRow) -> str:
        """What to tell of a release of another base; both are named."""
        return (
            f"release {release.number} has the base {shown(self.home, str(release.clip_base))}, and this server has "
            f"{self.name!r} ({digest12(self.digest)})"
        )

    def check(self, release: ReleaseRow | None) -> None:
        """Raise ReleaseError for a release of another base."""
        if release is not None and not self.has(release):
            raise ReleaseError(
                f"{self.why_not(release)}.",
                "Ask a server of that base, or change the base: `ratchet base switch`, then base.clip.",
            )


def clip_bases(releases: Sequence[ReleaseRow], names: Mapping[str, str], own: str) -> dict[int, str]:
    """The CLIP base of each release, by its number: the base's name where that is known, and 12 digits of its digest.

    Args:
        names: of the registered bases, by digest.
        own: ``base.clip``. A release that names no base is of the only one that there was: that of the other releases,
            or this.
    """
    digests = {row.clip_base for row in releases if row.clip_base is not None}
    only = next(iter(digests)) if len(digests) == 1 else None

    def base(digest: str | None) -> str:
        if digest is None:
            return own
        return f"{names[digest]} ({digest12(digest)})" if digest in names else digest12(digest)

    return {row.number: base(row.clip_base or only) for row in releases}


def spaces_of_bases(ledger: Ledger, home: Path) -> set[str]:
    """Image spaces of the newest release of every base that was live: their tables stay when the base changes, so that
    a switch back finds its index. Those of a base alone are known where it is registered.
    """
    alone = (base_of(home, str(row.clip_base)) for row in ledger.newest_of_each_base() if row.clip is None)
    return ledger.image_spaces_of_bases() | {base.spaces.image for base in alone if base is not None}
