from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import BENCHMARKS, run
from benchmarks.swap import ROLLBACK_EVERY, VLM_EVERY, Swaps, by_swap
from core.settings import Settings
from demo.load.traffic import CheckedSample
from ratchet_client import ServerError


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_flags_and_builds_no_base_for_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, Settings(home=tmp_path / "home"), ["--help"])
    assert not ended.value.code and not (tmp_path / "home").exists()


class RecordingClient:
    """Refuses the first rollbacks for now."""

    def __init__(self, refuses: int = 0) -> None:
        self.calls: list[str] = []
        self.refuses = refuses

    def release(self, clip: str = "", *, reason: str, force: bool, vlm: str = "") -> dict[str, Any]:
        self.calls.append("vlm" if vlm else "clip")
        return {"prepare_seconds": 0.0, "commit_seconds": 0.0}

    def rollback(self, reason: str) -> None:
        self.calls.append("rollback")
        if len(self.calls) <= self.refuses:
            raise ServerError("the ledger did not say in time.", status=503)


def test_every_fourth_change_is_a_rollback_and_the_vlm_changes_at_a_smaller_number() -> None:
    client, swaps = RecordingClient(), Swaps(["a", "b"], ["v", "w"])
    for number in range(1, 101):
        swaps.change(client, number)
    assert client.calls[ROLLBACK_EVERY - 1 :: ROLLBACK_EVERY] == ["rollback"] * 25
    assert (client.calls.count("vlm"), swaps.vlm_releases) == (100 // VLM_EVERY, 100 // VLM_EVERY)
    assert (len(swaps.releases), len(swaps.rollbacks), len(swaps.windows)) == (70, 25, 100)
    alone, without = RecordingClient(refuses=2), Swaps(["a"], [])
    without.change(alone, ROLLBACK_EVERY)
    assert (alone.calls, without.refused, len(without.rollbacks)) == (["rollback"] * 3, 2, 1), "it is made again"
    for number in range(1, 22):
        without.change(alone, number)
    assert "vlm" not in alone.calls


def test_a_request_is_inside_of_a_swap_by_when_it_was_sent_and_not_by_how_long_it_took() -> None:
    """One request in a hundred takes a second at any time; with swaps of zero length, none of them is inside one."""
    samples = [CheckedSample(due=n / 100, seconds=1.0 if n % 100 == 0 else 0.01, release=1) for n in range(10_000)]
    rounds = by_swap(samples, [(n + 0.505, n + 0.505) for n in range(100)], reach=0.01)
    assert [len(inside) for inside, _ in rounds] == [1] * 100
    assert {seconds for inside, _ in rounds for seconds in inside} == {0.01}
    assert sum(len(outside) for _, outside in rounds) == 9_900
    assert max(rounds[0][1]) == 1.0
