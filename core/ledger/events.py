"""Queries of events and the audit log. Events are written in the transaction of their fact, and published later, once
(:mod:`streams.kafka.events`). Their ID is derived from the fact (``release-12``), so repeated writes add nothing. The
audit log records who did what, to which subject, when; rows are only added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, cast

from sqlalchemy import CursorResult, delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.errors import LedgerError
from core.ledger.database import Queries, insert_new
from core.ledger.leases import check_lease
from core.ledger.rows import AdapterRow, AuditRow, EventRow, EventType, ProposalRow, ReleaseRow, utc_now

#: CloudEvents type by occurrence.
EVENT_TYPES: Final[Mapping[str, EventType]] = {
    "candidate": "ratchet.candidate.v1",
    "verdict": "ratchet.verdict.v1",
    "proposal": "ratchet.proposal.v1",
    "release": "ratchet.release.v1",
    "rollback": "ratchet.rollback.v1",
    "deletion": "ratchet.deletion.v1",
    "gap": "ratchet.gap.v1",
    "feedback": "ratchet.feedback.v1",
    "index": "ratchet.index.v1",
}
#: Brokers accept 1 MB by default, and an event has some 500 bytes in addition to its data.
MAX_DATA_BYTES = 512 * 1024
MAX_TEXT_CHARS = 4000


class EventQueries(Queries):
    def record_event(self, type: EventType, event_id: str, subject: str, data: Mapping[str, Any]) -> bool:
        """Record a standalone event. Returns False, without effect, if the ID exists. ``event_id`` is derived from the
        fact, at most 200 characters; ``subject``, also the key of its Kafka record, at most 300; ``data`` is JSON of at
        most :data:`MAX_DATA_BYTES`. Raises LedgerError if an argument is invalid."""
        with self.database.write() as session:
            return add_event(session, type, event_id, subject, data)

    def waiting_events(self, limit: int = 100) -> list[EventRow]:
        query = select(EventRow).where(EventRow.published.is_(False)).order_by(EventRow.id).limit(limit)
        return self._all(query)

    def count_waiting_events(self) -> int:
        return self._first(select(func.count()).select_from(EventRow).where(EventRow.published.is_(False))) or 0

    def events(self, limit: int = 100) -> list[EventRow]:
        return self._all(select(EventRow).order_by(EventRow.id.desc()).limit(limit))

    def mark_published(self, places: Mapping[int, tuple[int, int]], *, lease: str, epoch: int) -> None:
        """Mark events as published at ``places``: partition and offset in the topic, by the events' ``id``. Raises
        LeaseLost, and marks nothing, if the publisher's lease is lost."""
        with self.database.write() as session:
            check_lease(session, lease, epoch)
            for row_id, (partition, offset) in sorted(places.items()):
                session.execute(
                    update(EventRow)
                    .where(EventRow.id == row_id, EventRow.published.is_(False))
                    .values(published=True, partition=partition, offset=offset)
                )

    def prune_events(self, before: datetime) -> int:
        """Remove published events from before a time. Returns their number. Gaps stay: they are recorded from rows of
        the sample store, and would be published again."""
        old = delete(EventRow).where(EventRow.published.is_(True), EventRow.time < before)
        with self.database.write() as session:
            result = session.execute(old.where(EventRow.type != EVENT_TYPES["gap"]))
            return int(cast(CursorResult[Any], result).rowcount)

    def audit(self, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
        with self.database.write() as session:
            note(session, actor, action, subject, detail)

    def audit_rows(self, limit: int = 100, subject: str | None = None, actor: str | None = None) -> list[AuditRow]:
        """The newest audit rows, newest first, optionally of one actor or subject: ``release 12``, or ``release`` for
        all releases."""
        query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if subject is not None:
            about = AuditRow.subject
            query = query.where(or_(about == subject, about.startswith(f"{subject} ", autoescape=True)))
        if actor is not None:
            query = query.where(AuditRow.actor == actor)
        return self._all(query)


def add_event(session: Session, type: EventType, event_id: str, subject: str, data: Mapping[str, Any]) -> bool:
    _check(type, event_id, subject, data)
    values = {"event_id": event_id, "type": type, "subject": subject, "data": dict(data), "time": utc_now()}
    return insert_new(session, EventRow.event_id, {**values, "published": False})


def clipped(text: str | None) -> str | None:
    return None if text is None else text[:MAX_TEXT_CHARS]


def _check(type: str, event_id: str, subject: str, data: Mapping[str, Any]) -> None:
    if type not in EVENT_TYPES.values():
        raise LedgerError(f"there is no event type {type!r}.", f"Types are: {', '.join(EVENT_TYPES.values())}.")
    for name, text, most in (("id", event_id, 200), ("subject", subject, 300)):
        if not 0 < len(text) <= most:
            raise LedgerError(f"the {name} of an event has {len(text)} characters.", f"1 to {most} are possible.")
    try:
        size = len(json.dumps(data, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise LedgerError(f"the data of event {event_id} is not JSON: {error}.", "Give plain values.") from None
    if size > MAX_DATA_BYTES:
        raise LedgerError(
            f"the data of event {event_id} has {size} bytes.", f"At most {MAX_DATA_BYTES} fit; tell where the rest is."
        )


def tell_proposal(session: Session, row: ProposalRow) -> None:
    """Add an event for a proposal's state, once per state."""
    data = {
        "proposal": row.id, "kind": row.kind, "state": row.state, "family": row.family, "clip": row.clip,
        "vlm": row.vlm, "actor": row.actor, "reason": clipped(row.reason), "update": row.update_id,
        "release": row.release, "share": row.share, "error": clipped(row.error),
    }  # fmt: skip
    add_event(session, "ratchet.proposal.v1", f"proposal-{row.id}-{row.state}", f"proposals/{row.id}", data)


def tell_release(session: Session, row: ReleaseRow, proposal: ProposalRow | None, previous: int | None) -> None:
    """Add the events of a live release; a rollback is reported as both."""
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
    adapter = None if clip is None else session.get(AdapterRow, clip)
    return None if adapter is None else adapter.image_space


def _same_before(session: Session, row: ReleaseRow) -> int | None:
    query = (
        select(ReleaseRow.number)
        .where(ReleaseRow.number < row.number, ReleaseRow.share >= 1)
        .where(ReleaseRow.clip.is_not_distinct_from(row.clip), ReleaseRow.vlm.is_not_distinct_from(row.vlm))
        .order_by(ReleaseRow.number.desc())
        .limit(1)
    )
    return session.scalars(query).first()


def note(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
    session.add(AuditRow(actor=actor, action=action, subject=subject, detail=detail))
