"""One class with every query of the ledger; the queries are beside, a file per subject."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ops.ledger.audit import AuditQueries
from ops.ledger.bases import BaseQueries
from ops.ledger.budget import BudgetQueries
from ops.ledger.collection import CollectionQueries
from ops.ledger.database import Database, open_database
from ops.ledger.deletions import DeletionQueries
from ops.ledger.events import EventQueries
from ops.ledger.holds import HoldQueries
from ops.ledger.keys import KeyQueries
from ops.ledger.learning import LearningQueries
from ops.ledger.leases import LeaseQueries
from ops.ledger.proposals import ProposalQueries
from ops.ledger.releases import ReleaseQueries
from ops.ledger.resubmissions import ResubmissionQueries
from ops.ledger.rollout import RolloutQueries


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
        """See :meth:`ops.ledger.database.Database.reading`."""
        return self.database.reading()

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()
