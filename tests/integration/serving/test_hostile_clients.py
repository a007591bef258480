"""A good client next to hostile ones, on a running server."""

from __future__ import annotations

import pytest

from benchmarks.hostile import measure, plan
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = pytest.mark.integration


@pytest.mark.long
def test_a_good_client_is_answered_beside_hostile_ones(server: ServerFixture) -> None:
    figures = measure(server.settings, plan(vlm=False, scale=0.2), seconds=2.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    assert figures["good_requests"] > 20
    assert all(row["answers"] for name, row in figures["attacks"].items() if name in ("picture_bombs", "health_flood"))
    assert figures["attacks"]["picture_bombs"]["answers"].keys() <= {"200", "429", "closed"}
    assert set(figures["attacks"]["health_flood"]["answers"]) == {"200", "429"}
    assert 0 < figures["rss_max_gib"] < 16


@pytest.mark.long
def test_a_silent_crowd_of_one_address_is_cut_off_at_its_bound(server: ServerFixture) -> None:
    silent = plan(vlm=False, scale=0.3)["silent"]  # 1,260 connections within 5 s, of which 512 may stay
    figures = measure(server.settings, {"silent": silent}, seconds=4.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    answers = figures["attacks"]["silent"]["answers"]
    assert answers.get("closed", 0) + answers.get("refused", 0) > 50
