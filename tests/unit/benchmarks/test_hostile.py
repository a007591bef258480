from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import pytest
from PIL import Image

from benchmarks import hostile_attacks as attacks
from benchmarks.hostile import Turn, figures, rollback_figures
from benchmarks.hostile_attacks import bomb, sampling
from demo.load.traffic import CheckedSample, Report


def figures_of(samples: list[CheckedSample], turn: Turn, began: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the whole run, and of the one attack."""
    found = figures(Report(len(samples), 1, 0, (1,), tuple(samples)), [turn], began, 2**29, 2**30)
    return found, found["attacks"][turn.name]


def test_requests_and_rollbacks_count_with_the_attack_that_they_overlap() -> None:
    samples = [
        CheckedSample(0.0, 9.0, 0, "failed while it warmed up"),
        *(CheckedSample(10.0 + n / 100, 0.1, 1) for n in range(100)),
        CheckedSample(19.9, 0.3, 1),  # due before the attack, answered in it
        CheckedSample(25.0, 0.2, 0, "503"),
        CheckedSample(31.0, 0.1, 1),
    ]
    whole, attack = figures_of(samples, Turn("silent", 20.0, 30.0, {"closed": 3}), 10.0)
    assert (whole["good_requests"], whole["good_failed"]) == (103, 1)
    assert whole["p99_ratio"] == pytest.approx(3, rel=0.05)
    assert (attack["good_failed"], attack["answers"]) == (1, {"closed": 3})
    assert (whole["rss_quiet_gib"], whole["rss_max_gib"], whole["rss_ratio"]) == (0.5, 1, 2)
    turns = [Turn("silent", 20.0, 30.0, {}), Turn("bombs", 40.0, 50.0, {})]
    back = rollback_figures([(10.0, 0.2), (19.9, 0.4), (25.0, 0.1)], ["rollback: 503"], turns)
    assert (back["rollbacks"], back["rollbacks_failed"], back["rollback_seconds_max"]) == (3, 1, 0.4)
    assert back["rollback_seconds"] == {"silent": 0.4, "bombs": None}


def test_what_attackers_send_is_odd_and_the_same_again_and_no_small_picture_comes_twice() -> None:
    data = bomb(4_000_000)
    assert len(data) < 40_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.mode) == ((2000, 2000), "RGBA")
    first, second = ([sampling(drawn) for _ in range(50)] for drawn in (random.Random(1), random.Random(1)))
    assert first == second and all(len(body) > 3 and json.dumps(body) for body in first)
    made = {attacks._small_picture() for _ in range(20)}
    assert len(made) == 20
    with Image.open(io.BytesIO(base64.b64decode(made.pop().split(",")[1]))) as image:
        assert (image.size, image.mode, image.format) == ((16, 16), "RGB", "BMP")
