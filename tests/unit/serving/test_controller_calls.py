"""An operator's call outlives the controller that carries it out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from ops.errors import ReleaseConflict
from serving.errors import Unavailable
from serving.releases.commands import HoldCommand, ReleaseCommand, RollbackCommand
from serving.releases.types import ReleaseResult
from serving.replicas.controller_calls import ControllerCalls

ROLLBACK = RollbackCommand(actor="ann", reason="r", expected_live=2)
OUTCOME = ReleaseResult(3, None, None, "rollback", "clip", 1, 0.0, 0.0, 1)


def calls(*results: Any) -> ControllerCalls:
    """Controllers that answer one after the other; an exception is one that dies."""
    left = list(results)

    async def change(command: Any = None) -> Any:
        result = left.pop(0)
        if isinstance(result, RayActorError):
            raise result
        return result

    method = SimpleNamespace(remote=change)
    handle: Any = SimpleNamespace(change=method, hold=method, status=method)
    return ControllerCalls(handle)


async def test_a_rollback_is_asked_of_another_controller_when_one_dies() -> None:
    assert await calls(RayActorError(), OUTCOME).change(ROLLBACK) == OUTCOME


async def test_a_rollback_that_may_have_been_carried_out_is_not_called_a_conflict() -> None:
    with pytest.raises(Unavailable, match="ended during the call, and now release 3 is live"):
        await calls(RayActorError(), ReleaseConflict("release 3 is live, not 2", "look")).change(ROLLBACK)


async def test_a_release_is_not_asked_for_twice() -> None:
    command = ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="r", expected_live=2)
    with pytest.raises(Unavailable, match="ended during the call"):
        await calls(RayActorError(), OUTCOME).change(command)


async def test_a_hold_and_a_look_at_the_status_are_asked_of_another_controller_when_one_dies() -> None:
    await calls(RayActorError(), None).hold(HoldCommand(actor="ann", reason="incident"))
    assert await calls(RayActorError(), {"started": True}).status() == {"started": True}
