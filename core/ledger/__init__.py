"""The ledger: what was trained, judged, proposed and released, and by whom. SQLite, or PostgreSQL by URL.

>>> ledger = Ledger.open("sqlite:///.ratchet/ledger.db")
>>> ledger.live()
ReleaseRow(number=3, clip='clip-0123456789ab', ...)
"""

from core.ledger.ledger import Ledger
from core.ledger.rows import (
    AdapterRow,
    AuditRow,
    BaseUpgradeRow,
    DeletionRow,
    DeletionState,
    EventRow,
    EventType,
    Family,
    GateOutcome,
    HoldRow,
    KeyRow,
    KeyScope,
    LeaseRow,
    ProposalKind,
    ProposalRow,
    ProposalState,
    ReleaseRow,
    ResubmissionRow,
    Scope,
    UpdateRow,
    UpdateState,
    VerdictRow,
    answers,
)

__all__ = [
    "AdapterRow",
    "AuditRow",
    "BaseUpgradeRow",
    "DeletionRow",
    "DeletionState",
    "EventRow",
    "EventType",
    "Family",
    "GateOutcome",
    "HoldRow",
    "KeyRow",
    "KeyScope",
    "LeaseRow",
    "Ledger",
    "ProposalKind",
    "ProposalRow",
    "ProposalState",
    "ReleaseRow",
    "ResubmissionRow",
    "Scope",
    "UpdateRow",
    "UpdateState",
    "VerdictRow",
    "answers",
]
