"""Errors that Ratchet raises on purpose.

    RatchetError
    ├── ConfigError        a setting is wrong or missing
    │   └── SelectorError      a selector for a deletion is wrong
    ├── RecordError        a record (or image) from outside is invalid
    ├── BrokerError        Kafka cannot be reached or refuses
    │   ├── RegistryUnavailable    the schema registry cannot be reached or refuses
    │   │   └── SchemaUnavailable      it answers, but does not give this schema
    │   ├── Fenced             another sender took over, and nothing more may be sent
    │   └── RecordTooLarge     one record is larger than the broker takes
    ├── StoreError         the sample store, the catalog or the artifacts
    │   ├── ArtifactsUnavailable   the object store of the artifacts cannot be used now
    │   ├── StoreUnavailable   it cannot be read or written now
    │   ├── StoreFull          its disk is full
    │   ├── Superseded         another process has taken over a partition
    │   ├── SkipRefused        offsets cannot be skipped
    │   └── UnknownRecord      there is no quarantined record at this place
    ├── BaseModelError     a base checkpoint is missing or unusable
    ├── AdapterError       an adapter directory is missing, damaged or does not fit the base
    ├── TrainingError      an update cannot be trained
    ├── DiskFull           there is no room for what an update keeps on disk
    ├── BudgetError        the compute budget is too small
    ├── GateError          a suite is wrong or cannot be scored
    ├── AccessError        a caller's name or key is invalid
    ├── LedgerError        a row is missing or contradicts what is there
    │   ├── AlreadyResubmitted    a quarantined record was sent again before
    │   ├── LeaseLost          another process holds the lease now
    │   └── LedgerUnavailable  the database cannot be used now
    │       └── CommitUnknown      it is unknown whether a change was made
    └── ReleaseError       a proposal could not be released
        ├── AdapterCollected   the garbage collector has deleted an adapter's files
        ├── Held               updates are on hold
        └── ReleaseConflict    another operator released first

Every error says what happened, what it was about, and (``fix``) what to do. BrokerError and those that end with
Unavailable are an ``Outage``, whose ``state`` is ``away``, ``slow``, ``refused`` or ``full``. That, the base and the
first three are the client's, whose errors of a server (``ServerError``) are in :mod:`ratchet_client.errors`.
"""

from __future__ import annotations

from ratchet_client.errors import BrokerError as BrokerError
from ratchet_client.errors import ConfigError as ConfigError
from ratchet_client.errors import Outage as Outage
from ratchet_client.errors import OutageState as OutageState
from ratchet_client.errors import RatchetError as RatchetError
from ratchet_client.errors import RecordError as RecordError


class SelectorError(ConfigError):
    """A selector for a deletion is wrong. ``field`` names the wrong field."""

    def __init__(self, field: str, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.field = field


class RegistryUnavailable(BrokerError):
    """The schema registry cannot be reached or denies access: an outage, which says nothing about the record at
    hand."""


class SchemaUnavailable(RegistryUnavailable):
    """The schema registry answers, but not with one schema: it fails, or returns something else."""


class Fenced(BrokerError):
    """Another sender took over, and the broker (or the lease) blocks this one."""


class RecordTooLarge(BrokerError):
    """The broker does not take a record of this size. ``index``: its place among the records sent together."""

    index: int = 0


class StoreError(RatchetError):
    """The sample store, the catalog or the artifacts."""


class ArtifactsUnavailable(StoreError, Outage):
    """The object store of the artifacts does not answer, or denies access; try again."""


class StoreUnavailable(StoreError, Outage):
    """The sample store cannot be read or written now; try again."""


class StoreFull(StoreUnavailable):
    """The disk of the sample store is full."""

    state = "full"


class Superseded(StoreError):
    """Another process has claimed partitions that this one wanted to write; ``keys`` names them."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(f"{', '.join(keys)}: another process has claimed it since.", "It goes on from there.")
        self.keys = keys


class SkipRefused(StoreError):
    """Offsets of a partition cannot be skipped; its position is unchanged."""


class UnknownRecord(StoreError):
    """No record was quarantined at this place."""


class FeedbackRefused(RatchetError):
    """Feedback contradicts what its caller said before, or is one too many (``too_many``)."""

    def __init__(self, message: str, *, too_many: bool = False) -> None:
        super().__init__(message, "Go on tomorrow." if too_many else "What was said first stays.")
        self.too_many = too_many


class BaseModelError(RatchetError):
    """A base checkpoint is missing or unusable."""


class AdapterError(RatchetError):
    """An adapter directory is missing, damaged or does not fit the base."""


class TrainingError(RatchetError):
    """An update cannot be trained."""


class DiskFull(RatchetError):
    """There is no room for what an update keeps on disk; it continues when there is."""


class BudgetError(RatchetError):
    """The compute budget is too small."""


class GateError(RatchetError):
    """A suite is wrong or cannot be scored."""


class AccessError(RatchetError):
    """A caller's name or key is invalid."""


class LedgerError(RatchetError):
    """A ledger row is missing or contradicts what is there."""


class AlreadyResubmitted(LedgerError):
    """A quarantined record was sent again before."""


class LeaseLost(LedgerError):
    """Another process holds the lease now; this one's write was dropped."""


class LedgerUnavailable(LedgerError, Outage):
    """The database is unreachable, silent, full, read-only or too busy. Nothing was changed; try again."""


class CommitUnknown(LedgerUnavailable):
    """The connection was lost during COMMIT, and the ledger could not be queried since: the outcome is unknown."""


class ReleaseError(RatchetError):
    """A proposal could not be released; what is live stays live."""


class AdapterCollected(ReleaseError, AdapterError):
    """The garbage collector has deleted an adapter's files; the ledger still knows it."""


class Held(ReleaseError):
    """Updates are on hold: the proposal waits until an operator resumes."""


class ReleaseConflict(ReleaseError):
    """Another operator released first."""
