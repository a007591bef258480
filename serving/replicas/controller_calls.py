"""Calls of operators to the release controller."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from ops import metrics
from serving.releases.commands import HoldingCommand, LiveCommand
from serving.releases.controller import outcome_of
from serving.releases.types import Outcome


class ControllerCalls:
    """Implements :class:`serving.http.app_state.Operations`. Expected errors come as values, and are raised here."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def change(self, command: LiveCommand) -> Outcome:
        """See :meth:`serving.releases.controller.ReleaseController.change`."""
        with metrics.operator.action(command.action):
            outcome: Outcome = outcome_of(await self.handle.change.remote(command))
        return outcome

    async def hold(self, command: HoldingCommand) -> None:
        """See :meth:`serving.releases.controller.ReleaseController.hold`."""
        with metrics.operator.action(command.action):
            outcome_of(await self.handle.hold.remote(command))

    async def status(self) -> dict[str, Any]:
        """What the controller does."""
        status: dict[str, Any] = await self.handle.status.remote()
        return status
