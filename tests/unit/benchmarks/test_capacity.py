from __future__ import annotations

import json

import pytest

from benchmarks import capacity, plan
from benchmarks.capacity import MAX_BATCH, Cell, ServiceTimes, fit
from core.errors import ConfigError
from core.settings import Settings

KNOWN = ServiceTimes(first=0.02, each=0.01, request=0.005)


def test_times_are_found_in_the_rates_that_they_lead_to() -> None:
    cells: list[Cell] = []
    for items, clients in ((1, 1), (1, 8), (1, 32), (16, 1), (16, 8)):
        inputs = min(items * clients, MAX_BATCH)
        cells.append(("image", items, clients, inputs / KNOWN.batch(inputs, inputs / items)))
    assert vars(fit(cells, "image", MAX_BATCH)) == pytest.approx(vars(KNOWN))
    with pytest.raises(ValueError, match="0 measured rates of texts"):
        fit(cells, "text", MAX_BATCH)


def test_waits_are_those_of_queueing_theory() -> None:
    """One at a time, all alike (M/D/1): the mean wait is load / 2 (1 - load) of a service."""
    times = ServiceTimes(first=0.1, each=0.0, request=0.0)
    load = capacity.open_loop(times, rate=5.0, encoders=1, max_batch=1, requests=200_000)
    assert load.busy == pytest.approx(0.5, rel=0.02)
    assert load.requests_per_second == pytest.approx(5.0, rel=0.02)
    assert 0.1 < load.p50 < 0.15 and load.p99 > 0.25
    idle = capacity.open_loop(times, rate=0.01, encoders=1, max_batch=1)
    assert (idle.p50, idle.p99) == pytest.approx((0.1, 0.1))


def test_encoders_keep_the_deadline_and_grow_with_the_load() -> None:
    answers = [capacity.encoders_for(KNOWN, rate, 0.5) for rate in (10, 100, 1000, 10_000)]
    for number, outcome in answers:
        assert outcome.p99 <= 0.5 and outcome.busy <= 0.8 and number >= 1
    numbers = [number for number, _ in answers]
    assert numbers == sorted(numbers) and numbers[-1] > 100
    assert capacity.encoders_for(KNOWN, 100, 0.1)[0] >= capacity.encoders_for(KNOWN, 100, 5.0)[0]
    with pytest.raises(ConfigError, match="without any other"):
        capacity.encoders_for(KNOWN, 1, 0.01)


def test_a_plan_is_printed_and_without_a_load_or_a_known_machine_says_what_to_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan.main(Settings(), ["--images", "200", "--p99", "0.5"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["load"]["images_per_second"], figures["load"]["p99_seconds"]) == (200, 0.5)
    assert figures["parts"][0]["name"] == "encoders for images" and figures["parts"][0]["count"] > 1
    for words, says in ((["--p99", "2"], "--images"), (["--images", "5", "--machine", "cray"], "avx512")):
        with pytest.raises(SystemExit):
            plan.main(Settings(), words)
        assert says in capsys.readouterr().err
