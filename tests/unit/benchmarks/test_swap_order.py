"""What the swap benchmark changes, and in which order."""

from __future__ import annotations

from typing import Any

from benchmarks.swap import ROLLBACK_EVERY, VLM_EVERY, Swaps, overlaps, sent_inside, split
from ops.load.traffic import Sample
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


def test_a_request_is_inside_of_a_swap_by_when_it_was_sent_and_not_by_how_long_it_took() -> None:
    """One request in a hundred takes a second, whatever happens; swaps of no length change that for none of them."""
    samples = [Sample(due=n / 100, seconds=1.0 if n % 100 == 0 else 0.01, release=1) for n in range(10_000)]
    swaps = [(n + 0.505, n + 0.505) for n in range(100)]
    inside, outside = split(samples, lambda sample: sent_inside(sample, swaps, reach=0.01))
    assert (len(inside), max(inside)) == (100, 0.01) and max(outside) == 1.0
    overlapping, _ = split(samples, lambda sample: overlaps(sample, swaps))
    assert overlapping.count(1.0) == 100, "half of those that overlap are slow"
