"""Queries of events: what others are told of, written in the transaction of the fact, published later and once.

The id of an event follows from the fact (``release-12``), so that a fact is told once whatever is repeated. Who
publishes holds a lease, and marks with its epoch; see :mod:`streams.kafka.events`.

The audit log says who did what to which, when; operators ask it afterwards. Its rows are only added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, cast

from sqlalchemy import CursorResult, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from core.errors import LedgerError
from core.ledger.database import Queries
from core.ledger.leases import check_lease
from core.ledger.rows import AdapterRow, AuditRow, EventRow, EventType, ProposalRow, ReleaseRow, utc_now

#: Type of the CloudEvent by what happened.
EVENT_TYPES: Final[Mapping[str, EventType]] = {
    "candidate": "ratchet.candidate.v1",
    "verdict": "ratchet.verdict.v1",
    "proposal": "ratchet.proposal.v1",
    "release": "ratchet.release.v1",
    "rollback": "ratchet.rollback.v1",
    "deletion": "ratchet.deletion.v1",
    "gap": "ratchet.gap.v1",
}
#: Brokers take 1 MB by default, and an event has some 500 bytes besides its data.
MAX_DATA_BYTES = 512 * 1024
MAX_TEXT_CHARS = 4000


class EventQueries(Queries):
    """Writing events and publishing them."""

    def record_event(self, type: EventType, event_id: str, subject: str, data: Mapping[str, Any]) -> bool:
        """Record an event of its own. Returns False, and does nothing, when there is one with this id.

        Args:
            type: one of :data:`EVENT_TYPES`' values.
            event_id: follows from the fact; at most 200 characters.
            subject: what it is about, the key of its Kafka record; at most 300 characters.
            data: JSON, at most :data:`MAX_DATA_BYTES`.

        Raises:
            LedgerError: one of them is not so.
        """
        with self.database.write() as session:
            return add_event(session, type, event_id, subject, data)

    def waiting_events(self, limit: int = 100) -> list[EventRow]:
        """Events that are not published yet, oldest first."""
        query = select(EventRow).where(EventRow.published.is_(False)).order_by(EventRow.id).limit(limit)
        return self._all(query)

    def count_waiting_events(self) -> int:
        """Number of events that are not published yet."""
        query = select(func.count()).select_from(EventRow).where(EventRow.published.is_(False))
        with self.database.read() as session:
            return session.scalar(query) or 0

    def events(self, limit: int = 100) -> list[EventRow]:
        """The newest events, newest first."""
        return self._all(select(EventRow).order_by(EventRow.id.desc()).limit(limit))

    def mark_published(self, places: Mapping[int, tuple[int, int]], *, lease: str, epoch: int) -> None:
        """Mark events as published.

        Args:
            places: partition and offset in the topic, by the events' ``id``.
            lease: name of the lease that the publisher holds, with its ``epoch``.

        Raises:
            LeaseLost: it does not hold it any more; nothing is marked.
        """
        with self.database.write() as session:
            check_lease(session, lease, epoch)
            for row_id, (partition, offset) in sorted(places.items()):
                session.execute(
                    update(EventRow)
                    .where(EventRow.id == row_id, EventRow.published.is_(False))
                    .values(published=True, partition=partition, offset=offset)
                )

    def prune_events(self, before: datetime) -> int:
        """Remove events that were published and are from before a time. Returns their number.

        Those of gaps stay: each is recorded from its row in the sample store, and would be told a second time.
        """
        old = delete(EventRow).where(EventRow.published.is_(True), EventRow.time < before)
        with self.database.write() as session:
            result = session.execute(old.where(EventRow.type != EVENT_TYPES["gap"]))
            return int(cast(CursorResult[Any], result).rowcount)

    def audit(self, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
        """Record an action that changes no other table."""
        with self.database.write() as session:
            note(session, actor, action, subject, detail)

    def audit_rows(self, limit: int = 100, subject: str | None = None, actor: str | None = None) -> list[AuditRow]:
        """The newest rows, newest first.

        Args:
            subject: only rows about it: ``release 12``, or ``release`` for all releases.
            actor: only rows of one actor.
        """
        query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if subject is not None:
            about = AuditRow.subject
            query = query.where(or_(about == subject, about.startswith(f"{subject} ", autoescape=True)))
        if actor is not None:
            query = query.where(AuditRow.actor == actor)
        return self._all(query)


def add_event(session: Session, type: EventType, event_id: str, subject: str, data: Mapping[str, Any]) -> bool:
    """Add an event in the transaction of its fact; see :meth:`EventQueries.record_event`."""
    _check(type, event_id, subject, data)
    values = {
        "event_id": event_id,
        "type": type,
        "subject": subject,
        "data": dict(data),
        "time": utc_now(),
        "published": False,
    }
    dialect = session.get_bind().dialect.name
    statement = (postgresql if dialect == "postgresql" else sqlite).insert(EventRow).values(**values)
    statement = statement.on_conflict_do_nothing(index_elements=[EventRow.event_id]).returning(EventRow.id)
    return session.scalars(statement).first() is not None


def clipped(text: str | None) -> str | None:
    """A text from outside, short enough for an event."""
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
    """A proposal was made, or came to a state; each state is told once."""
    data = {
        "proposal": row.id, "kind": row.kind, "state": row.state, "family": row.family, "clip": row.clip,
        "vlm": row.vlm, "actor": row.actor, "reason": clipped(row.reason), "update": row.update_id,
        "release": row.release, "share": row.share, "error": clipped(row.error),
    }  # fmt: skip
    add_event(session, "ratchet.proposal.v1", f"proposal-{row.id}-{row.state}", f"proposals/{row.id}", data)


def tell_release(session: Session, row: ReleaseRow, proposal: ProposalRow | None, previous: int | None) -> None:
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
    adapter = None if clip is None else session.get(AdapterRow, clip)
    return None if adapter is None else adapter.image_space


def _same_before(session: Session, row: ReleaseRow) -> int | None:
    """The newest earlier plain release with the same adapters."""
    query = (
        select(ReleaseRow.number)
        .where(ReleaseRow.number < row.number, ReleaseRow.share >= 1)
        .where(ReleaseRow.clip.is_not_distinct_from(row.clip), ReleaseRow.vlm.is_not_distinct_from(row.vlm))
        .order_by(ReleaseRow.number.desc())
        .limit(1)
    )
    return session.scalars(query).first()


def note(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
    """Add a row in the transaction of the change that it tells of."""
    session.add(AuditRow(actor=actor, action=action, subject=subject, detail=detail))
