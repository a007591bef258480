"""The backlog benchmark at a small size: the real trainer process, and every pending pair accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.backlog.pairs import pair_rows
from benchmarks.backlog.run_backlog import run, show
from ratchet_client.images import decode_image
from tests.integration.updater.home import make_home

pytestmark = pytest.mark.integration


def test_pairs_are_unlike_each_other_and_divided_as_ingest_does() -> None:
    table, tally = pair_rows(0.15)("bench", 100, 500)
    assert len(set(table["id"].to_pylist())) == len(set(table["image"].to_pylist())) == 400
    assert table["offset"].to_pylist() == list(range(100, 500))
    pixels: Image.Image = decode_image(table["image"][0].as_py())
    assert pixels.size == (32, 32)
    assert tally["train"] + tally["fresh_eval"] == tally["sample"] == 400
    assert 30 <= tally["fresh_eval"] <= 90
    assert tally["train/text"] == table["split"].to_pylist().count("train")


@pytest.mark.long
def test_every_pending_pair_is_visited_or_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_home(tmp_path / "home")
    train = pair_rows(settings.ingest.fresh_eval_share)("bench", 0, 300)[1]["train"]
    show(run(settings, pairs=300, updates=2))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["updates"], figures["errors"], figures["problems"]) == (2, 0, [])
    first = figures["by_update"][0]
    assert (first["pending"], first["visited"]) == (train, 6 * 3)  # steps, and new rows of a batch
    assert figures["visited"] + figures["passed_over"] == figures["pending"] > train
    assert figures["first_step_seconds"] > 0
    assert 0.05 < figures["memory_gib"] < 4
    assert figures["machine"]["cores"] >= 1
