"""Queries of the audit log: who did what to which, when. Rows are only added."""

from __future__ import annotations

from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from core.ledger import tables as t
from core.ledger.database import Database
from core.ledger.rows import AuditRow


class AuditQueries:
    """What operators ask afterwards."""

    database: Database

    def audit(self, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
        """Record what somebody did that changes no other table."""
        with self.database.write() as session:
            note(session, actor, action, subject, detail)

    def audit_rows(self, limit: int = 100, subject: str | None = None, actor: str | None = None) -> list[AuditRow]:
        """The newest rows, newest first.

        Args:
            subject: only rows about it: ``release 12``, or ``release`` for all releases.
            actor: only rows of one actor.
        """
        query = select(t.Audit).order_by(t.Audit.id.desc()).limit(limit)
        if subject is not None:
            about = t.Audit.subject
            query = query.where(or_(about == subject, about.startswith(f"{subject} ", autoescape=True)))
        if actor is not None:
            query = query.where(t.Audit.actor == actor)
        with self.database.read() as session:
            rows = session.scalars(query)
            return [AuditRow(r.id, r.actor, r.action, r.subject, r.detail, r.created_at) for r in rows]


def note(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
    """Add a row in the transaction of the change that it tells of."""
    session.add(t.Audit(actor=actor, action=action, subject=subject, detail=detail))
