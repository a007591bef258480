"""Which base is live, and why the updater of a base may have to wait."""

from __future__ import annotations

from pathlib import Path

from core.digests import digest12
from core.ledger import Ledger
from serving.engines.clip_base import ClipBase
from serving.engines.registered import shown
from updater.step.learner import Base


def waits_for_base(ledger: Ledger, home: Path, base: Base) -> str | None:
    """Why nothing is trained on a base now: the live release has another one, or an upgrade waits to be released."""
    if not isinstance(base, ClipBase):
        return None
    stable = ledger.stable()
    if stable is not None and stable.clip_base not in (None, base.digest):
        return (
            f"release {stable.number} has the base {shown(home, str(stable.clip_base))}, and this updater has "
            f"{base.name!r} ({digest12(base.digest)}): set base.clip to the live one and start again"
        )
    approved = ledger.approved_upgrade()
    if approved is not None and approved.old_base == base.digest:
        return (
            f"{approved.update_id} to the base {approved.new_name!r} passed the gate: `ratchet base switch "
            f"{approved.new_name}` releases it, `ratchet base upgrade {approved.new_name} --cancel` drops it"
        )
    return None
