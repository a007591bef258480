"""Which release is watched, against which, and until when: all of it from the ledger, so every process agrees."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ProposalKind, ReleaseRow
from core.settings.serving import Rollout

UNWATCHED: tuple[ProposalKind, ...] = ("initial", "rollback")
"""A first release has no incumbent; a rollback is what the guard itself does, and is never taken back by it."""


@dataclass(frozen=True, slots=True)
class GuardTarget:
    """A release under guard."""

    release: ReleaseRow
    incumbent: ReleaseRow
    kind: ProposalKind
    until: float
    """Seconds since the epoch; infinite for a canary or a shadow, which is watched for as long as it is one."""

    @property
    def began(self) -> float:
        """When it was committed; seconds since the epoch."""
        return self.release.created_at.timestamp()

    def differs(self, family: Family) -> bool:
        """Whether it changes this model. What it leaves alone needs no comparing."""
        return self.release.adapter(family) != self.incumbent.adapter(family)


def find_guard_target(ledger: Ledger, settings: Rollout, now: float) -> GuardTarget | None:
    """The live release, if it is watched at ``now`` (seconds since the epoch)."""
    with ledger.reading():
        live = ledger.live()
        incumbent = None if live is None else ledger.incumbent(live.number, live.clip_base)
        if live is None or incumbent is None:
            return None
        kind = "release" if live.proposal_id is None else ledger.proposal(live.proposal_id).kind
    until = live.created_at.timestamp() + settings.guard_seconds if live.plain else math.inf
    target = GuardTarget(live, incumbent, kind, until)
    if kind in UNWATCHED or now >= until or not (target.differs("clip") or target.differs("vlm")):
        return None
    return target
