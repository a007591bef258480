from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.swap import ROLLBACK_EVERY, VLM_EVERY, Swaps, by_swap, ratio_interval
from demo.load.traffic import CheckedSample
from ratchet_client import ServerError


class RecordingClient:
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
    alone, without = RecordingClient(), Swaps(["a"], [])
    for number in range(1, 22):
        without.change(alone, number)  # type: ignore[arg-type]
    assert "vlm" not in alone.calls


def test_a_rollback_that_is_refused_for_now_is_made_again() -> None:
    class Refusing(RecordingClient):
        def rollback(self, reason: str) -> None:
            super().rollback(reason)
            if len(self.calls) < 3:
                raise ServerError("the ledger did not say in time.", status=503)

    client, swaps = Refusing(), Swaps(["a"], [])
    swaps.change(client, ROLLBACK_EVERY)  # type: ignore[arg-type]
    assert (client.calls, swaps.refused, len(swaps.rollbacks)) == (["rollback"] * 3, 2, 1)


def test_a_request_is_inside_of_a_swap_by_when_it_was_sent_and_not_by_how_long_it_took() -> None:
    """One request in a hundred takes a second at any time; with swaps of zero length, none of them is inside one."""
    samples = [CheckedSample(due=n / 100, seconds=1.0 if n % 100 == 0 else 0.01, release=1) for n in range(10_000)]
    rounds = by_swap(samples, [(n + 0.505, n + 0.505) for n in range(100)], reach=0.01)
    assert [len(inside) for inside, _ in rounds] == [1] * 100
    assert {seconds for inside, _ in rounds for seconds in inside} == {0.01}
    assert sum(len(outside) for _, outside in rounds) == 9_900
    assert max(rounds[0][1]) == 1.0


def test_the_interval_of_the_ratio_narrows_with_swaps_and_holds_it() -> None:
    random = np.random.default_rng(1)

    def interval(swaps: int) -> tuple[float, float]:
        return ratio_interval(
            [(list(1.2 * random.exponential(size=200)), list(random.exponential(size=200))) for _ in range(swaps)]
        )

    few, many = interval(10), interval(200)
    assert few[0] < many[0] < 1.2 < many[1] < few[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
