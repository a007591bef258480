"""Queries of the guarded rollout: what answers beside a canary, and which adapters may be released without force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from core.ledger import tables as t
from core.ledger.database import Database, as_row
from core.ledger.releases import of_base
from core.ledger.rows import Family, ReleaseRow

PLAIN = 1.0


class RolloutQueries:
    """What canaries, shadows and the guard need. All of it follows from rows that are never changed."""

    database: Database

    def stable(self) -> ReleaseRow | None:
        """The newest plain release: what answers the requests that a canary does not. None before the first start."""
        with self.database.read() as session:
            return _newest_plain(session)

    def incumbent(self, number: int, base: str | None = None) -> ReleaseRow | None:
        """The newest plain release before ``number``: what it is compared with, and what the guard goes back to; with
        ``base`` of those whose CLIP has this base.
        """
        with self.database.read() as session:
            return _newest_plain(session, number, base)

    def was_stable(self, family: Family, adapter: str | None) -> bool:
        """Whether an adapter (None: the base alone) was in a plain release, and so answered all requests."""
        column = t.Release.clip if family == "clip" else t.Release.vlm
        query = select(t.Release.number).where(t.Release.share >= PLAIN, column.is_not_distinct_from(adapter))
        with self.database.read() as session:
            return session.scalars(query.limit(1)).first() is not None

    def withdrawn(self, names: Sequence[str | None]) -> dict[str, str]:
        """Those of some adapters that the guard took back, with the reason."""
        wanted = [name for name in names if name is not None]
        query = select(t.Adapter).where(t.Adapter.name.in_(wanted), t.Adapter.withdrawn.is_not(None))
        with self.database.read() as session:
            return {row.name: row.withdrawn or "" for row in session.scalars(query)}

    def withdraw(
        self, names: Sequence[str | None], *, actor: str, subject: str, reason: str, evidence: dict[str, Any]
    ) -> None:
        """Mark adapters, so that they are not released again by themselves, and write down why. The first reason
        stays."""
        with self.database.write() as session:
            for name in names:
                row = None if name is None else session.get(t.Adapter, name)
                if row is not None:
                    row.withdrawn = row.withdrawn or reason
            detail = {"reason": reason, "adapters": [name for name in names if name is not None], **evidence}
            session.add(t.Audit(actor=actor, action="withdraw", subject=subject, detail=detail))

    def unproven(self, name: str) -> str:
        """Why an adapter needs force to be released; empty when it passed the gate, or was live before."""
        with self.database.read() as session:
            adapter = session.get(t.Adapter, name)
            if adapter is not None and adapter.withdrawn:
                return f"{name} was withdrawn: {adapter.withdrawn}"
            served = select(t.Release.number).where(
                or_(t.Release.clip == name, t.Release.vlm == name), t.Release.share >= PLAIN
            )
            passed = select(t.Verdict.id).where(t.Verdict.adapter == name, t.Verdict.outcome == "passed")
            if session.scalars(served.limit(1)).first() or session.scalars(passed.limit(1)).first():
                return ""
            return f"{name} has no passed verdict in the ledger and was never live"


def _newest_plain(session: Session, before: int | None = None, base: str | None = None) -> ReleaseRow | None:
    query = select(t.Release).where(t.Release.share >= PLAIN, of_base(base)).order_by(t.Release.number.desc()).limit(1)
    if before is not None:
        query = query.where(t.Release.number < before)
    row = session.scalars(query).first()
    return None if row is None else as_row(ReleaseRow, row)
