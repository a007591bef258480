"""What operators ask for. A command goes unchanged from the HTTP route to the release protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from core.ledger.rows import Family
from serving.releases.types import Adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Who asks, and why; both go into the audit log."""

    action: ClassVar[str]
    """Name in the metrics of operator calls."""
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _LiveCommand(Command):
    expected_live: int
    """The release that was live when the operator decided: another one by now is a conflict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseCommand(_LiveCommand):
    """Release adapters; a family that is not named keeps what is live."""

    action = "release"
    adapters: Adapters
    share: float = 1.0
    """See :attr:`core.ledger.rows.ReleaseRow.share`."""
    force: bool = False
    """Also adapters that no gate passed and that were never live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteCommand(_LiveCommand):
    """Make a plain release of the canary or shadow that is live."""

    action = "promote"


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackCommand(_LiveCommand):
    """Release the adapters of an older release."""

    action = "rollback"
    to: int | None = None
    """Number of that release; None: the newest one that had another adapter."""
    family: Family | None = None
    """Only this family's adapter; None: both."""
    allow_withdrawn: bool = False
    """Also to an adapter that was withdrawn: the guard goes back to the incumbent, whatever was said of it before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldCommand(Command):
    """Let updates wait."""

    action = "hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCommand(Command):
    """Let updates through again."""

    action = "resume"


LiveCommand = ReleaseCommand | PromoteCommand | RollbackCommand
"""Changes what is live."""
HoldingCommand = HoldCommand | ResumeCommand
"""Changes whether updates wait."""
