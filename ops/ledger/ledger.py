"""One class that knows every verb of the ledger; the verbs live beside, a file per subject."""

from __future__ import annotations

from ops.ledger.audit import AuditVerbs
from ops.ledger.budget import BudgetVerbs
from ops.ledger.database import Database, open_database
from ops.ledger.deletions import DeletionVerbs
from ops.ledger.events import EventVerbs
from ops.ledger.keys import KeyVerbs
from ops.ledger.learning import LearningVerbs
from ops.ledger.leases import LeaseVerbs
from ops.ledger.releases import ReleaseVerbs
from ops.ledger.resubmissions import ResubmissionVerbs
from ops.ledger.rollout import RolloutVerbs


class Ledger(
    LearningVerbs, ReleaseVerbs, RolloutVerbs, BudgetVerbs, KeyVerbs, ResubmissionVerbs, EventVerbs, LeaseVerbs,
    DeletionVerbs, AuditVerbs,
):  # fmt: skip
    """Safe to use from several threads and processes; every verb is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str, migrate: bool = True) -> Ledger:
        """Connect, and bring the schema up to date. Raises LedgerError when the database cannot be reached."""
        return cls(open_database(url, migrate))

    @classmethod
    def lazy(cls, url: str) -> Ledger:
        """Connect at the first call, each of which raises LedgerUnavailable while the database is away. For processes
        that must start without it; the schema is left as it is.
        """
        return cls(open_database(url, migrate=False, check=False))

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()
