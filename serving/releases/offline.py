"""A rollback in the ledger alone, while no server answers. Servers that run adopt it as they follow the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import ReleaseConflict
from core.ledger import Family, Ledger, ReleaseRow
from serving.releases.rollback import rollback_target
from serving.releases.types import scope_of


def roll_back_offline(
    ledger: Ledger,
    families: Sequence[Family],
    *,
    to: int | None,
    actor: str,
    reason: str,
    expected_live: int | None = None,
    hold_after_rollback: bool = False,
) -> ReleaseRow:
    """Release the adapters of an older release, without asking a replica whether it can load them.

    Args:
        families: that are served, or the one that is meant.
        to: number of the release to go back to; None: the newest one that had another adapter.
        hold_after_rollback: see :attr:`core.settings.Rollout.hold_after_rollback`.

    Raises:
        ReleaseError: there is nothing to go back to.
        ReleaseConflict: something else is live by now.
    """
    live = ledger.live()
    number = live.number if live else 0
    if expected_live is not None and expected_live != number:
        raise ReleaseConflict(f"release {number} is live, not {expected_live}.", "Look at `ratchet releases list`.")
    adapters = rollback_target(ledger, families, to, base=live.clip_base if live else None)
    assert live is not None  # else there was no target
    stable = ledger.stable() or live
    clip, vlm = (adapters.get(family, stable.adapter(family)) for family in ("clip", "vlm"))
    proposal = ledger.propose(
        "rollback", family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"), actor=actor,
        reason=reason, expected_live=number,
    )  # fmt: skip
    try:
        row = ledger.commit_release(
            number + 1, clip=clip, vlm=vlm, actor=actor, reason=reason, proposal_id=proposal.id,
            hold_after_rollback=hold_after_rollback,
        )  # fmt: skip
    except ReleaseConflict as conflict:
        ledger.advance_proposal(proposal.id, "failed", str(conflict))
        raise
    ledger.audit(actor, "rolled back offline", f"release {row.number}", {"to": to, "families": list(families)})
    return row
