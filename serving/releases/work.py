"""The proposal that is being prepared, and how it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ReleaseConflict
from core.ledger.rows import Family, ProposalRow, Scope
from serving.releases.commands import RollbackCommand

Goal = Mapping[Family, str | None]
"""Adapters of both families that a release is to have."""


class Postponed(Exception):
    """A proposal gave way to a rollback of the other family or to a hold; it waits for its turn again."""


@dataclass(slots=True)
class Work:
    """A proposal from the moment it has its turn until it is committed."""

    proposal: ProposalRow
    task: asyncio.Task[Any] | None = None
    """Prepares it; may be cancelled."""
    goal: Goal | None = None
    """What replicas are loading for it."""
    number: int = 0
    """Of the release that it will be."""
    stopped_by: str = ""
    stopped_for: Scope = "both"

    def stop(self, command: RollbackCommand, scope: Scope) -> None:
        """Prepare no further, and do not commit."""
        self.stopped_by = f"{command.actor} rolled back while it was being prepared"
        self.stopped_for = scope
        if self.task is not None:
            self.task.cancel()

    def check(self) -> None:
        """Raise when it was stopped.

        Raises:
            Postponed: for an update of the other family, which waits again.
            ReleaseConflict: for all others.
        """
        if not self.stopped_by:
            return
        if self.proposal.kind == "update" and {self.proposal.family, self.stopped_for} == {"clip", "vlm"}:
            raise Postponed
        raise ReleaseConflict(f"{self.stopped_by}.", "Look at what is live, and propose again.")
