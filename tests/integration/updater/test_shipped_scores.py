"""The scores that the repository states are of the shipped models, and the VLM uses the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.clip import build_base, score_base
from demo.clip import scores as clip_scores
from demo.vlm import build_vlm
from demo.vlm import scores as vlm_scores
from demo.vlm.shipped import ASSETS, MODEL

CHECKED = ("fluent3d", "flags")
"""Domains whose packages are small (21 MB together)."""
TOLERANCE = 0.011
"""Float sums differ between processors: of 270 items, a few near ties may fall the other way."""


@pytest.mark.long
def test_the_scores_of_the_clip_can_be_reproduced(tmp_path: Path) -> None:
    base = build_base(tmp_path)
    found = score_base(tmp_path, base.name, CHECKED)
    written = clip_scores.committed_scores()
    for domain in CHECKED:
        assert found[domain].keys() == written[domain].keys()
        for metric, value in found[domain].items():
            slack = max(TOLERANCE, 1.01 / written[domain]["items"])
            assert abs(value - written[domain][metric]) <= slack, (domain, metric)


def test_the_scores_of_the_clip_are_worth_shipping() -> None:
    """The scores that the documentation promises; chance is 0.003 for recall@1 and 0.017 for recall@5."""
    scores = clip_scores.committed_scores()

    def mean(metric: str, domains: tuple[str, ...]) -> float:
        return sum(scores[domain][metric] for domain in domains) / len(domains)

    seen = ("noto", "twemoji", "openmoji", "openclipart", "pixel_ultica")
    unseen = ("fluent3d", "stamp_photo", "flags", "game_icons", "pixel_mshock")
    assert scores.keys() == {*seen, *unseen, "fashion"}
    assert mean("recall@5", seen) > 0.444
    assert mean("recall@5", unseen) > 0.237
    assert mean("recall@1", unseen) > 0.106


def test_the_scores_of_the_vlm_are_of_the_committed_model_and_need_the_picture(tmp_path: Path) -> None:
    base = build_vlm(tmp_path)
    assert json.loads((ASSETS / vlm_scores.SCORES).read_text())["base"] == base.digest
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 9_000_000
    written = vlm_scores.committed_scores()
    assert written.keys() == {"name", "colour", "presence", "category"}
    for kind, stated in written.items():
        assert stated["items"] >= 250 and stated["model"] > max(stated["majority"], stated["blind"]) + 0.15, kind
