"""Small runs of benchmarks: real workers and trainers, a real broker, real faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stream import chaos, ingest
from core.loading import load_settings


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.long
def test_ingest_is_measured_beside_a_bare_consumer(capsys: pytest.CaptureFixture[str]) -> None:
    small = ingest.Sizes(images=((20_000, 30),), rounds=1, stores=(200,), commits=2, writes=((2_000, 50, 10, 500),))
    figures = ingest.run(load_settings(environ={}), small)
    ingest.show(figures)
    assert last_line(capsys) == figures
    [size] = figures["throughput"]
    assert figures["ratio_to_bare"] == size["ratio_to_bare"] > 0
    names = ("records_per_second", "cpu_seconds")
    assert all(size[who][name] > 0 for who in ("fetch", "bare", "one", "two") for name in names)
    assert [each["stored"] for each in figures["growth"]] == [200]
    assert all(each["commit_seconds"] > 0 and each["start_seconds"] > 0 for each in figures["growth"])
    assert figures["memory_growth"] > 0
    assert 0 < figures["write_amplification"] < 5, "this counts bytes, not seconds"


@pytest.mark.long
def test_nothing_is_lost_or_stored_twice_while_workers_die_the_broker_goes_away_and_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chaos.run(load_settings(environ={}), seconds=20, records=500, seed=7, folder=tmp_path)
    chaos.show(figures)
    assert last_line(capsys) == figures
    assert figures["produced"] == 500 and figures["drained"]
    assert {name: figures[name] for name in chaos.VIOLATIONS} == dict.fromkeys(chaos.VIOLATIONS, 0)
    assert figures["kills"] + figures["stops"] > 0 < figures["broker_cuts"]
