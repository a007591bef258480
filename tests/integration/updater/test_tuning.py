"""A merge weight tuned on one half of the suites and judged by the other."""

from __future__ import annotations

import pytest

from core.settings import Settings
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, made_by, report_of
from tests.unit.gate.builders import folder_dataset
from tests.unit.updater.builders import recipe
from updater.gate.run import open_evaluator
from updater.gate.suites import load_suites
from updater.service.gate_update import TuningScores, tuned_on, update_suites
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    home = settings.home
    plan = recipe("paint", max_steps=4, reference_limit=20, merge={"rule": "linear", "search": [0.3, 1.0]})
    (home / "default.yaml").write_text(plan.to_yaml())
    folder_dataset(home / "data" / "few", count=6)
    (home / "suites" / "few.yaml").write_text("task: retrieval\ndata: ${home}/data/few\n")
    return settings


def test_the_weight_is_chosen_on_one_half_and_judged_by_the_other(settings: Settings) -> None:
    add_samples(settings, 12)
    add_samples(settings, 48, split="fresh_eval")
    service = UpdaterService(settings)
    update = made_by(service)
    scores = update.cost["search_scores"]
    chosen = scores[f"{update.cost['merge_weight']:g}"]
    assert set(scores) == {"0.3", "1"} and chosen == max(scores.values())
    assert update.cost["search_gflops"] > 0
    report = report_of(settings, update)
    halves = {suite["name"]: suite["half"] for suite in report["suites"]}
    assert halves == {"few": "all", "things": "hidden", "fresh.things": "hidden"}
    assert sorted(report["meta"]["tuned_on"]) == ["fresh.things", "things"]
    suites, fresh = update_suites(settings, service.store, update)
    with open_evaluator(settings, load_base(settings.home, "tiny")) as evaluator:
        name = str(update.adapter)
        evaluator.load(name, service.artifacts.fetch(f"adapters/{name}"))
        marks = [
            float(evaluator.score(suite.half("tuning"), name).hits.mean())
            for suite in (*suites, *fresh)
            if suite.name != "few"
        ]
    assert len(marks) == 2 and sum(marks) / 2 == pytest.approx(chosen)


def test_a_suite_too_small_to_be_divided_is_left_to_the_gate(settings: Settings) -> None:
    suites = load_suites(settings.gate.suites, settings.home, "clip")
    assert {suite.name for suite in suites} == {"few", "things"}
    assert [suite.name for suite in tuned_on(suites, min_items=5)] == ["things"]
    assert tuned_on(suites, min_items=30) == []
    scores = TuningScores(settings, load_base(settings.home, "tiny"), tuned_on(suites, min_items=5))
    assert 5 <= scores.passes <= 25
