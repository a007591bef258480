from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from core.errors import ReleaseConflict
from serving.errors import Unavailable
from serving.http import calls as module
from serving.http.calls import ControllerCalls
from serving.releases.types import HoldCommand, ReleaseCommand, ReleaseResult, RollbackCommand

ROLLBACK = RollbackCommand(actor="ann", reason="r", expected_live=2)
RELEASE = ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="r", expected_live=2)
OUTCOME = ReleaseResult(3, None, None, "rollback", "clip", 1, 0.0, 0.0, 1)


class Forever:
    """A call that is never answered."""

    def __init__(self, *_: Any) -> None:
        self.cancelled = False

    def __await__(self) -> Any:
        return asyncio.Event().wait().__await__()

    def cancel(self) -> None:
        self.cancelled = True


def calls(*results: Any) -> ControllerCalls:
    """Controllers that answer one after the other; an exception stands for one that dies."""
    left = list(results)

    async def change(command: Any = None) -> Any:
        result = left.pop(0)
        if isinstance(result, RayActorError):
            raise result
        return result

    method = SimpleNamespace(remote=change)
    handle: Any = SimpleNamespace(change=method, hold=method, status=method)
    return ControllerCalls(handle)


async def test_a_rollback_is_asked_of_another_controller_when_one_dies_and_a_release_is_not() -> None:
    assert await calls(RayActorError(), OUTCOME).change(ROLLBACK) == OUTCOME
    with pytest.raises(Unavailable, match="ended during the call, and now release 3 is live"):  # it may be carried out
        await calls(RayActorError(), ReleaseConflict("release 3 is live, not 2", "look")).change(ROLLBACK)
    with pytest.raises(Unavailable, match="ended during the call"):
        await calls(RayActorError(), OUTCOME).change(RELEASE)


async def test_a_controller_that_stands_still_is_named_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTROLLER_SECONDS", 0.05)
    still = SimpleNamespace(remote=Forever)
    handle: Any = SimpleNamespace(change=still, status=still)
    for command in (ROLLBACK, RELEASE):
        with pytest.raises(Unavailable, match=r"the release controller has not answered for 0\.05 s"):
            await asyncio.wait_for(ControllerCalls(handle).change(command), 30)


async def test_a_release_that_takes_long_is_waited_for_while_its_controller_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CONTROLLER_SECONDS", 0.02)
    prepared, looks = asyncio.Event(), 0

    async def change(_: Any) -> ReleaseResult:
        await prepared.wait()
        return OUTCOME

    async def status() -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks == 3:
            prepared.set()
        return {}

    handle: Any = SimpleNamespace(change=SimpleNamespace(remote=change), status=SimpleNamespace(remote=status))
    assert await ControllerCalls(handle).change(RELEASE) == OUTCOME


async def test_a_hold_and_a_look_at_the_status_are_asked_of_another_controller_when_one_dies() -> None:
    await calls(RayActorError(), None).hold(HoldCommand(actor="ann", reason="incident"))
    assert await calls(RayActorError(), {"started": True}).status() == {"started": True}
