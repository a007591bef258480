"""The ledger: what was trained, judged, proposed and released, and by whom. SQLite, or PostgreSQL by URL.

>>> ledger = Ledger.open("sqlite:///.ratchet/ledger.db")
>>> ledger.live()
ReleaseRow(number=3, clip='clip-0123456789ab', ...)

One class has every query; they are defined in this package's modules, one per subject.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from core.ledger.budget import BudgetQueries
from core.ledger.collection import CollectionQueries
from core.ledger.database import Database, open_database
from core.ledger.events import EventQueries
from core.ledger.feedback import FeedbackQueries
from core.ledger.indexes import IndexQueries
from core.ledger.keys import KeyQueries
from core.ledger.learning import LearningQueries
from core.ledger.leases import LeaseQueries
from core.ledger.proposals import ProposalQueries
from core.ledger.records import RecordQueries
from core.ledger.release_audits import ReleaseAuditQueries
from core.ledger.rows import AdapterRow as AdapterRow
from core.ledger.rows import BaseUpgradeRow as BaseUpgradeRow
from core.ledger.rows import DeletionRow as DeletionRow
from core.ledger.rows import DeletionState as DeletionState
from core.ledger.rows import EventRow as EventRow
from core.ledger.rows import Family as Family
from core.ledger.rows import KeyRow as KeyRow
from core.ledger.rows import ProposalRow as ProposalRow
from core.ledger.rows import ReleaseAuditRow as ReleaseAuditRow
from core.ledger.rows import ReleaseRow as ReleaseRow
from core.ledger.rows import ResubmissionRow as ResubmissionRow
from core.ledger.rows import UpdateRow as UpdateRow
from core.ledger.rows import VerdictRow as VerdictRow
from core.ledger.rows import answers as answers
from core.ledger.trust import TrustQueries


class Ledger(
    LearningQueries, ProposalQueries, ReleaseAuditQueries, BudgetQueries, KeyQueries, EventQueries, LeaseQueries,
    RecordQueries, CollectionQueries, FeedbackQueries, TrustQueries, IndexQueries,
):  # fmt: skip
    """Safe to use from several threads and processes; every call is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str, migrate: bool = True) -> Ledger:
        """Connect and migrate the schema. Raises LedgerError if the database cannot be reached."""
        return cls(open_database(url, migrate))

    @classmethod
    def lazy(cls, url: str) -> Ledger:
        """Connect on the first call, for processes that must start without the database; calls raise LedgerUnavailable
        while it is unreachable. Does not migrate."""
        return cls(open_database(url, migrate=False, check=False))

    def reading(self) -> AbstractContextManager[None]:
        """See :meth:`core.ledger.database.Database.reading`."""
        return self.database.reading()

    def close(self) -> None:
        self.database.close()
