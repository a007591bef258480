"""One class that knows every verb of the ledger; the verbs live beside, a file per subject."""

from __future__ import annotations

from sqlalchemy import select

from ops.ledger import tables as t
from ops.ledger.budget import BudgetVerbs
from ops.ledger.database import Database, open_database
from ops.ledger.learning import LearningVerbs
from ops.ledger.releases import ReleaseVerbs
from ops.ledger.rollout import RolloutVerbs
from ops.ledger.rows import AuditRow


class Ledger(LearningVerbs, ReleaseVerbs, RolloutVerbs, BudgetVerbs):
    """Safe to use from several threads and processes; every verb is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str, migrate: bool = True) -> Ledger:
        """Connect, and bring the schema up to date. Raises LedgerError when the database cannot be reached."""
        return cls(open_database(url, migrate))

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()

    def audit_rows(self, limit: int = 100) -> list[AuditRow]:
        """The newest rows of the audit log, newest first."""
        with self.database.read() as session:
            found = session.scalars(select(t.Audit).order_by(t.Audit.id.desc()).limit(limit))
            return [AuditRow(r.id, r.actor, r.action, r.subject, r.detail, r.created_at) for r in found]
