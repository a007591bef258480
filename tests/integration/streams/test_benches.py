"""Small runs of the stream benchmarks: real workers, a real broker, real faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.stream import chaos, ingest
from benchmarks.stream.ingest import Sizes
from core.loading import load_settings

pytestmark = [pytest.mark.integration, pytest.mark.long]
SMALL = Sizes(images=((20_000, 30),), rounds=1, stores=(200,), commits=2, writes=((2_000, 50, 10, 500),))


def test_ingest_is_measured_beside_a_bare_consumer_and_told_as_one_line_of_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = ingest.run(load_settings(environ={}), SMALL)
    ingest.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    [size] = figures["throughput"]
    assert figures["ratio_to_bare"] == size["ratio_to_bare"] > 0
    assert all(
        size[who]["records_per_second"] > 0 < size[who]["cpu_seconds"] for who in ("fetch", "bare", "one", "two")
    )
    assert [each["stored"] for each in figures["growth"]] == [200]
    assert all(each["commit_seconds"] > 0 and each["start_seconds"] > 0 for each in figures["growth"])
    assert figures["memory_growth"] > 0
    assert 0 < figures["write_amplification"] < 5, "this counts bytes, not seconds"


def test_nothing_is_lost_or_stored_twice_while_workers_die_the_broker_goes_away_and_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chaos.run(load_settings(environ={}), seconds=20, records=500, seed=7, folder=tmp_path)
    chaos.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["produced"] == 500 and figures["drained"]
    assert {name: figures[name] for name in chaos.VIOLATIONS} == dict.fromkeys(chaos.VIOLATIONS, 0)
    assert figures["kills"] + figures["stops"] > 0 < figures["broker_cuts"]
