"""One class with every query of the ledger; the queries are beside, a file per subject."""

from __future__ import annotations

from contextlib import AbstractContextManager

from core.ledger.bases import BaseQueries
from core.ledger.budget import BudgetQueries
from core.ledger.collection import CollectionQueries
from core.ledger.database import Database, open_database
from core.ledger.deletions import DeletionQueries
from core.ledger.events import AuditQueries, EventQueries
from core.ledger.holds import HoldQueries
from core.ledger.keys import KeyQueries
from core.ledger.learning import LearningQueries
from core.ledger.leases import LeaseQueries
from core.ledger.proposals import ProposalQueries
from core.ledger.releases import ReleaseQueries
from core.ledger.resubmissions import ResubmissionQueries
from core.ledger.rollout import RolloutQueries


class Ledger(
    LearningQueries, ProposalQueries, ReleaseQueries, HoldQueries, RolloutQueries, BudgetQueries, KeyQueries,
    ResubmissionQueries, EventQueries, LeaseQueries, DeletionQueries, AuditQueries,
    BaseQueries, CollectionQueries,
):  # fmt: skip
    """Safe to use from several threads and processes; every call is one transaction."""

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

    def reading(self) -> AbstractContextManager[None]:
        """See :meth:`core.ledger.database.Database.reading`."""
        return self.database.reading()

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()
