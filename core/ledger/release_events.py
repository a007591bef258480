"""Events of proposals, releases and rollbacks, added in the transactions that make them."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.ledger import tables as t
from core.ledger.events import add_event, clipped


def tell_proposal(session: Session, row: t.Proposal) -> None:
    """A proposal was made, or came to a state; each state is told once."""
    data = {
        "proposal": row.id, "kind": row.kind, "state": row.state, "family": row.family, "clip": row.clip,
        "vlm": row.vlm, "actor": row.actor, "reason": clipped(row.reason), "update": row.update_id,
        "release": row.release, "share": row.share, "error": clipped(row.error),
    }  # fmt: skip
    add_event(session, "ratchet.proposal.v1", f"proposal-{row.id}-{row.state}", f"proposals/{row.id}", data)


def tell_release(session: Session, row: t.Release, proposal: t.Proposal | None, previous: int | None) -> None:
    """A release is live; a rollback is told as both."""
    subject = f"releases/{row.number}"
    data = {
        "number": row.number, "clip": row.clip, "vlm": row.vlm, "previous": previous,
        "image_space": _image_space(session, row.clip), "actor": row.actor, "reason": clipped(row.reason),
        "share": row.share,
    }  # fmt: skip
    add_event(session, "ratchet.release.v1", f"release-{row.number}", subject, data)
    if proposal is None:
        return
    tell_proposal(session, proposal)
    if proposal.kind == "rollback":
        back = {"number": row.number, "to": _same_before(session, row), "actor": row.actor, "reason": data["reason"]}
        add_event(session, "ratchet.rollback.v1", f"rollback-{row.number}", subject, back)


def _image_space(session: Session, clip: str | None) -> str | None:
    """The image space of an adapter in the ledger; None for the base, whose space the ledger does not know."""
    adapter = None if clip is None else session.get(t.Adapter, clip)
    return None if adapter is None else adapter.image_space


def _same_before(session: Session, row: t.Release) -> int | None:
    """The newest earlier plain release with the same adapters."""
    query = (
        select(t.Release.number)
        .where(t.Release.number < row.number, t.Release.share >= 1)
        .where(t.Release.clip.is_not_distinct_from(row.clip), t.Release.vlm.is_not_distinct_from(row.vlm))
        .order_by(t.Release.number.desc())
        .limit(1)
    )
    return session.scalars(query).first()
