"""A small run of the variety benchmark: a real broker, ingest, and updates of small models."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks.variety import run_variety
from benchmarks.variety.kinds import KINDS, samples
from core.loading import load_settings

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("kind", KINDS)
def test_all_records_of_a_kind_differ(kind: str) -> None:
    drawn = [sample.id for sample in samples(kind, 20)]
    assert len(set(drawn)) == 20
    assert drawn == [sample.id for sample in samples(kind, 20)], "and are the same in each run"


@pytest.mark.long
def test_nothing_that_differs_is_lost_and_each_kind_is_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_variety.run(load_settings(environ={}), ["invoices", "one colour"], 40, ["CLIP", "InternVL"])
    run_variety.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    expected = {"kinds": 2, "lost": 0, "dropped_different": 0, "updates": 4, "updates_stuck": 0, "families_failed": 0}
    assert {name: figures[name] for name in expected} == expected, figures["problems"]
    shares = [0.0, figures["held_out_share_min"], figures["held_out_share_max"], 0.5]
    assert all(low <= high for low, high in pairwise(shares)) and shares[1] > 0


def test_an_update_that_dies_is_counted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [([{"kind": "scans", "steps": 3}], "exit status -9: "), ([], "exit status -9: "), ([], "exit status 1: ")]
    monkeypatch.setattr(run_variety, "_lines", lambda command: told.pop(0))
    rows = run_variety.learn("CLIP", "nowhere", ["scans", "invoices", "panoramas"])
    assert [row["kind"] for row in rows] == ["scans", "invoices", "panoramas"]
    assert [row.get("stuck", False) for row in rows] == [False, True, True]
