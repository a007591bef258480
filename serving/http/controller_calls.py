"""Calls of operators to the release controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.errors import RatchetError, ReleaseConflict
from serving.errors import DeadlineExceeded, Unavailable
from serving.ray.replica_calls import Attempts, call_replica, queue_full
from serving.releases.controller import outcome_of
from serving.releases.types import HoldingCommand, LiveCommand, ReleaseResult, RollbackCommand

CONTROLLER_SECONDS: Final = 20.0
"""How long controllers that die are replaced by others in one call; and how long one may be silent."""
LOOK: Final = "Look at what is live (`ratchet releases list`), and ask again."


class ControllerCalls:
    """Calls to the release controller. Expected errors come as values, and are raised here."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def change(self, command: LiveCommand) -> ReleaseResult:
        """See :meth:`serving.releases.controller.ReleaseController.change`."""
        with metrics.operator.action(command.action):
            return outcome_of(await self._change(command))

    async def _change(self, command: LiveCommand) -> ReleaseResult | RatchetError:
        """A controller that dies while it carries out a rollback is no reason to wait: another one is asked. What is
        live can only be replaced once, so asking twice does not go back twice.
        """
        attempts, died = Attempts(CONTROLLER_SECONDS, "release controller"), False
        while attempts.left > 0:
            try:
                result: ReleaseResult | RatchetError = await self._answered(self.handle.change.remote(command))
            except BackPressureError:
                raise queue_full() from None
            except RayActorError as error:
                if not isinstance(command, RollbackCommand):
                    raise Unavailable("the release controller ended during the call.", LOOK) from None
                died = True
                await attempts.failed(error)
                continue
            if died and isinstance(result, ReleaseConflict):
                raise Unavailable(f"the release controller ended during the call, and now {result.message}", LOOK)
            return result
        raise attempts.over()

    async def _answered(self, response: Any) -> Any:
        """What a call returns, which may take hours, as long as the controller answers others.

        Raises:
            Unavailable: it stands still.
        """

        async def answer() -> Any:
            return await response

        task = asyncio.ensure_future(answer())
        try:
            while not (await asyncio.wait([task], timeout=CONTROLLER_SECONDS))[0]:
                try:
                    await self.status()
                except DeadlineExceeded:
                    raise Unavailable(
                        f"the release controller has not answered for {CONTROLLER_SECONDS:g} s.", LOOK
                    ) from None
                except RatchetError:
                    continue  # it answers, or is replaced: then the call ends
            return task.result()
        finally:
            task.cancel()

    async def hold(self, command: HoldingCommand) -> None:
        """See :meth:`serving.releases.controller.ReleaseController.hold`."""
        with metrics.operator.action(command.action):
            outcome_of(await self._asked_again(lambda: self.handle.hold.remote(command)))

    async def status(self) -> dict[str, Any]:
        """What the controller does."""
        status: dict[str, Any] = await self._asked_again(self.handle.status.remote)
        return status

    async def _asked_again(self, call: Callable[[], Any]) -> Any:
        """For what may be done twice: a controller that dies is followed by another one."""
        return await call_replica(call, Attempts(CONTROLLER_SECONDS, "release controller"))
