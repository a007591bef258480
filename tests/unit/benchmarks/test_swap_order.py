"""What the swap benchmark changes, and in which order."""

from __future__ import annotations

from typing import Any

from benchmarks.swap import ROLLBACK_EVERY, VLM_EVERY, Swaps
from serving.client import ServerError


class RecordingClient:
    """Notes calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def release(self, clip: str = "", *, reason: str, force: bool, vlm: str = "") -> dict[str, Any]:
        self.calls.append("vlm" if vlm else "clip")
        return {"prepare_seconds": 0.0, "commit_seconds": 0.0}

    def rollback(self, reason: str) -> None:
        self.calls.append("rollback")


def test_every_fourth_change_is_a_rollback_and_the_vlm_changes_at_a_smaller_number() -> None:
    client, swaps = RecordingClient(), Swaps(["a", "b"], ["v", "w"])
    for number in range(1, 101):
        swaps.change(client, number)  # type: ignore[arg-type]
    assert client.calls[ROLLBACK_EVERY - 1 :: ROLLBACK_EVERY] == ["rollback"] * 25
    assert (client.calls.count("vlm"), swaps.vlm_releases) == (100 // VLM_EVERY, 100 // VLM_EVERY)
    assert (len(swaps.releases), len(swaps.rollbacks), len(swaps.windows)) == (70, 25, 100)


def test_a_rollback_that_is_refused_for_now_is_made_again() -> None:
    class Refusing(RecordingClient):
        def rollback(self, reason: str) -> None:
            super().rollback(reason)
            if len(self.calls) < 3:
                raise ServerError("the ledger did not say in time.", status=503)

    client, swaps = Refusing(), Swaps(["a"], [])
    swaps.change(client, ROLLBACK_EVERY)  # type: ignore[arg-type]
    assert (client.calls, swaps.refused, len(swaps.rollbacks)) == (["rollback"] * 3, 2, 1)


def test_without_a_vlm_only_clip_is_released() -> None:
    client, swaps = RecordingClient(), Swaps(["a"], [])
    for number in range(1, 22):
        swaps.change(client, number)  # type: ignore[arg-type]
    assert "vlm" not in client.calls
