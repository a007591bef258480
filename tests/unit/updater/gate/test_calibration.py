"""Similarities become probabilities: the pairs, the curve, its error, and what the gate does with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.artifacts import Artifacts
from core.settings.updates import Gate
from serving.engines.calibration import (
    MOST_ERROR,
    Calibration,
    MatchCurve,
    calibration_key,
    dump_calibration,
    parse_calibration,
)
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.calibration import (
    FEWEST_QUERIES,
    KNOTS,
    Pairs,
    calibrate,
    calibration_error,
    first_hits,
    fit,
    judged_by_halves,
    knots,
    pairs_of,
    store_missing,
)
from updater.gate.run import diagnose
from updater.gate.score import Scorer
from updater.gate.suites import Suite
from updater.gate.verdict import Diagnostics, diagnostics_lines, jsonable

GATE = Gate()


def drawn(queries: int = 400, seed: int = 0, steep: float = 8.0) -> Pairs:
    """Ten hits of each query, whose probability of a match is a known function of their similarity."""
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(-0.2, 0.6, 10 * queries)
    match = rng.random(len(similarity)) < 1 / (1 + np.exp(-steep * (similarity - 0.3)))
    return Pairs(similarity, match, np.repeat(np.arange(queries), 10))


def test_a_curve_finds_the_probability_that_pairs_were_drawn_with_and_its_error_is_small() -> None:
    curve = fit(drawn(2000))
    assert curve is not None and curve.bounded and (curve.queries, curve.pairs) == (2000, 20_000)
    asked = np.linspace(-0.1, 0.5, 13)
    assert np.abs(curve(asked) - 1 / (1 + np.exp(-8 * (asked - 0.3)))).max() < 0.06
    assert curve.ci_low <= curve.error <= curve.ci_high < 0.02


@pytest.mark.parametrize("queries", [FEWEST_QUERIES, 173])
@pytest.mark.parametrize("steep", [-20.0, -3.0, 0.0, 3.0, 20.0])
def test_a_curve_is_monotone_bounded_and_never_certain(steep: float, queries: int) -> None:
    curve = fit(drawn(queries, 1, steep))
    assert curve is not None
    assert len(curve.similarity) == len(curve.probability) <= KNOTS
    assert np.all(np.diff(curve.similarity) > 0) and np.all(np.diff(curve.probability) >= 0)
    assert min(curve.probability) > 0 and max(curve.probability) < 1
    assert 0 <= curve.ci_low <= curve.error <= curve.ci_high <= 1
    beyond = curve([-1.0, 1.0])
    assert (beyond[0], beyond[1]) == (curve.probability[0], curve.probability[-1]) and np.isnan(curve(np.nan))
    assert parse_calibration(dump_calibration(Calibration({"text": curve}, (16, 8)))) == Calibration(
        {"text": curve}, (16, 8)
    )
    assert len(dump_calibration(Calibration({"text": curve, "label": curve, "image": curve}))) < 16_384


def test_a_threshold_of_probability_lets_as_many_through_in_another_space() -> None:
    """Of false pairs, with curves of ten spaces that differ in scale, each fitted on queries of its own."""
    asked = drawn(4000, seed=100)
    false = asked.similarity[~asked.match]
    let_through = []
    for seed, scale in enumerate(np.linspace(0.5, 1.5, 10)):
        own = drawn(1200, seed)
        curve = fit(replace(own, similarity=own.similarity * scale))
        assert curve is not None
        let_through.append([np.mean(curve(false * scale) >= least) for least in (0.2, 0.5)])
    assert np.abs(np.array(let_through) / let_through[0] - 1).max() < 0.15


def test_too_few_queries_matches_or_others_give_no_curve() -> None:
    pairs = drawn()
    assert fit(pairs[pairs.query < FEWEST_QUERIES - 1]) is None
    assert fit(Pairs(pairs.similarity, np.ones_like(pairs.match), pairs.query)) is None
    assert fit(Pairs(pairs.similarity, np.zeros_like(pairs.match), pairs.query)) is None


def test_similarities_that_are_all_alike_say_the_share_of_matches() -> None:
    pairs = drawn()
    curve = fit(Pairs(np.full_like(pairs.similarity, 0.25), pairs.match, pairs.query))
    assert curve is not None and len(curve.similarity) == 1
    assert curve([-1, 0.25, 1]) == pytest.approx(np.full(3, pairs.match.mean()), abs=0.01)


def test_similarities_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        first_hits(np.array([[0.1, np.nan]]), np.array([[True, False]]))


def test_the_error_of_probabilities_that_are_off_is_how_far_they_are_off_and_its_interval_holds_it() -> None:
    pairs = drawn(2000)
    true = 1 / (1 + np.exp(-8 * (pairs.similarity - 0.3)))
    exact, off = (calibration_error(pairs, true + shift) for shift in (0.0, 0.1))
    assert exact[0] < 0.02 and off[0] == pytest.approx(0.1, abs=0.02)
    assert off[1] < 0.1 < off[2] and off[2] - off[1] < 0.05


def test_a_query_is_judged_by_the_curve_of_the_other_half() -> None:
    pairs = drawn(200)
    marked = Pairs(pairs.similarity, pairs.query % 2 == 1, pairs.query)  # odd queries match, even ones never do
    given_by_halves = judged_by_halves(marked)
    assert given_by_halves[marked.match].max() < 0.1 and given_by_halves[~marked.match].min() > 0.9
    assert len(knots(marked)[0]) <= KNOTS


def test_pairs_are_the_first_ten_hits_and_queries_of_several_suites_stay_apart() -> None:
    similarity = np.random.default_rng(0).normal(size=(7, 30))
    pairs = first_hits(similarity, np.eye(7, 30, dtype=bool))
    assert np.bincount(pairs.query).tolist() == [10] * 7
    assert pairs.similarity[:10].tolist() == sorted(similarity[0], reverse=True)[:10]
    assert len(np.unique(Pairs.joined([pairs, pairs]).query)) == 14


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(ClipEngine(tiny_base(tmp_path_factory.mktemp("base")), threads=1))


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> list[Suite]:
    data = str(folder_dataset(tmp_path_factory.mktemp("data") / "things", count=60))
    return [Suite(name="caption", task="retrieval", data=data), Suite(name="kind", task="classification", data=data)]


def test_captions_find_pictures_classes_are_found_by_pictures_and_a_picture_never_finds_itself(
    scorer: Scorer, suites: list[Suite]
) -> None:
    retrieval, classes = (dict(pairs_of(scorer, suite, None)) for suite in suites)
    assert set(retrieval) == {"text"}  # each concept has one picture: none has a partner to find
    assert set(classes) == {"label", "image"}
    assert len(classes["label"].match) == 60 * 4 and classes["label"].match.sum() == 60
    assert len(classes["image"].match) == 600 and classes["image"].similarity.min() > -1.01


def test_suites_of_samples_which_come_and_go_move_no_curve_that_configured_ones_are_enough_for(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = {"fixed": drawn(400), "memory.new": drawn(400, 1, steep=2.0), "few": drawn(20)}
    monkeypatch.setattr(
        "updater.gate.calibration.pairs_of", lambda scorer, suite, adapter: [("text", pairs[suite.name])]
    )

    def curve(*names: str) -> Any:
        suites: Any = [SimpleNamespace(name=name, data="" if name.startswith("memory") else name) for name in names]
        return calibrate(scorer, suites, None).get("text")

    assert curve("fixed", "memory.new") == curve("fixed")
    assert curve("few", "memory.new") == fit(Pairs.joined([pairs["few"], pairs["memory.new"]]))
    assert curve("memory.new") == fit(pairs["memory.new"])
    assert curve("few") is None


def test_a_calibration_that_is_there_is_not_made_again(scorer: Scorer, suites: list[Suite], tmp_path: Path) -> None:
    artifacts = Artifacts(str(tmp_path))
    spaces = scorer.engine.spaces(None)
    key = calibration_key(spaces.image, spaces.text)
    store_missing(artifacts, scorer, suites, None, GATE)
    found = parse_calibration(artifacts.read_bytes(key))
    assert {*found.curves} == {*calibrate(scorer, suites, None)} >= {"label", "image"}
    artifacts.write_bytes(key, b"{}")
    store_missing(artifacts, scorer, suites, None, GATE)
    assert artifacts.read_bytes(key) == b"{}"


def test_an_error_above_the_bound_is_a_warning_of_the_verdict_which_keeps_no_knots() -> None:
    curve = fit(drawn(2000))
    assert curve is not None
    wide = replace(curve, ci_high=MOST_ERROR + 0.01)

    def found(each: MatchCurve) -> Diagnostics:
        evaluator: Any = SimpleNamespace(diagnostics=lambda *_: Diagnostics(calibration={"text": each}))
        scores: Any = [None]
        return diagnose(evaluator, scores, None, "clip-a", None)

    assert found(curve).warnings == ()
    (warning,) = found(wide).warnings
    assert "min_probability" in warning and "6.0%" in warning
    summary = found(wide).summary()
    assert "similarity" not in summary["calibration"]["text"] and json.dumps(jsonable(summary))
    assert any("expected calibration error" in line for line in diagnostics_lines(summary))
