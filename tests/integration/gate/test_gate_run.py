"""Whole gate runs through the real engine.

The tiny base is random, so the questions are fitted to its answers: captions are assigned so that one model finds them
(an assignment over its similarities). A model trained on them has really improved, and one trained away from them has
really lost.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from core.errors import GateError
from core.settings.updates import Gate
from serving.engines.clip import ClipEngine
from serving.engines.layers import PackedLinear
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.gate.builders import fresh_suite, picture, sample_rows
from updater.gate.clip import ClipEvaluator
from updater.gate.interim_analyses import AnalysisPlan, candidate_alpha
from updater.gate.run import run_gate
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Verdict

pytestmark = pytest.mark.integration
SETTINGS = Gate(margin=0.1)
COUNT = 160


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def engine(home: Path) -> ClipEngine:
    return ClipEngine(tiny_base(home), threads=1)


def deal(engine: ClipEngine, adapter: str | None, seeds: range, words: str) -> list[tuple[bytes, str]]:
    """Assign captions to pictures so that the model `adapter` finds as many as it can."""
    images = [picture(seed) for seed in seeds]
    texts = [f"{words} {chr(97 + i % 26)}{i}" for i in range(len(images))]
    vectors = engine.encode_images(np.stack([engine.base.preprocess.pixels(i) for i in images]), adapter)
    words_of = engine.encode_texts(texts, adapter)
    similarity = (vectors - vectors.mean(axis=0)) @ (words_of - words_of.mean(axis=0)).T
    _, best = linear_sum_assignment(-similarity)
    return [(image, texts[i]) for image, i in zip(images, best, strict=True)]


def folder_suite(home: Path, name: str, pairs: list[tuple[bytes, str]]) -> Suite:
    folder = home / "data" / name
    folder.mkdir(parents=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text"])
        for i, (image, text) in enumerate(pairs):
            (folder / f"{i}.png").write_bytes(image)
            writer.writerow([f"{i}.png", text])
    path = home / f"{name}.yaml"
    path.write_text(f"task: retrieval\ndata: ${{home}}/data/{name}\nmetric: recall@10\nmargin: 0.1\n")
    return load_suites([path], home)[0]


def fresh_from(pairs: list[tuple[bytes, str]]) -> Suite:
    rows = sample_rows(len(pairs), "new", [text for _, text in pairs])
    return fresh_suite(rows.set_column(1, "image", [[image for image, _ in pairs]]))


def judge(engine: ClipEngine, candidate: str, suite: Suite, **how: Any) -> Verdict:
    """Run the gate once; ``fresh`` is a gain suite, ``parity`` and ``cache`` are the evaluator's."""
    fresh = [how.pop("fresh")] if "fresh" in how else []
    own = {name: how.pop(name) for name in ("parity", "cache") if name in how}
    defaults: dict[str, Any] = {"incumbent": None, "plan": AnalysisPlan.alone(SETTINGS.alpha), "settings": SETTINGS}
    evaluator = ClipEvaluator(engine, **own)
    return run_gate(evaluator=evaluator, candidate=candidate, suites=[suite], fresh=fresh, **(defaults | how))


@pytest.fixture(scope="module")
def retention(home: Path, engine: ClipEngine) -> Suite:
    return folder_suite(home, "known", deal(engine, None, range(COUNT), "known"))


def load(engine: ClipEngine, home: Path, name: str, seed: int, scale: float) -> str:
    adapter = tiny_adapter(engine.base, home / name, seed, scale)
    engine.load(adapter, home / name)
    return adapter


@pytest.fixture(scope="module")
def gentle(home: Path, engine: ClipEngine) -> str:
    return load(engine, home, "gentle", seed=1, scale=0.02)


@pytest.fixture(scope="module")
def harsh(home: Path, engine: ClipEngine) -> str:
    return load(engine, home, "harsh", seed=2, scale=0.7)


def test_a_candidate_that_forgets_is_rejected_by_the_suite_it_forgot(
    engine: ClipEngine, retention: Suite, harsh: str
) -> None:
    learnt = fresh_from(deal(engine, harsh, range(1000, 1000 + COUNT), "new"))
    verdict = judge(engine, harsh, retention, fresh=learnt)
    known, new = verdict.suites
    assert verdict.outcome == "rejected"
    assert verdict.caught_by == ("known",)
    assert known.decision == "failed" and known.ci_high < 0
    assert new.decision == "passed", "it did learn: retention alone kept it out"
    assert known.worst and all(w.rank_after >= 10 > w.rank_before for w in known.worst)
    assert all(w.thumbnail.startswith("data:image/jpeg;base64,") for w in known.worst)
    beside = verdict.diagnostics
    assert beside.warnings == () and beside.shift is not None and beside.tail is None
    assert beside.shift.towers["image"].from_base == beside.shift.towers["image"].from_incumbent > 0
    assert beside.pairs["known"].n >= 5 and beside.pairs["known"].score.before == beside.pairs["known"].base


def test_a_candidate_that_learns_and_forgets_nothing_passes(home: Path, engine: ClipEngine) -> None:
    """The text tower is unchanged and images change a little: old captions stay found, the new ones are found
    better.
    """
    incumbent = load(engine, home, "other", seed=5, scale=0.7)
    candidate = load(engine, home, "gentle-too", seed=1, scale=0.02)
    kept = folder_suite(home, "kept", deal(engine, None, range(2000, 2000 + COUNT), "kept"))
    learnt = fresh_from(deal(engine, candidate, range(3000, 3000 + COUNT), "new"))
    verdict = judge(engine, candidate, kept, fresh=learnt, incumbent=incumbent)
    assert verdict.outcome == "passed", verdict.reasons
    assert verdict.caught_by == () and verdict.spent
    assert [s.decision for s in verdict.suites] == ["passed", "passed"]


def test_a_candidate_like_the_incumbent_is_inconclusive_and_the_same_again(
    engine: ClipEngine, retention: Suite, gentle: str, home: Path
) -> None:
    nothing_new = fresh_from(deal(engine, None, range(4000, 4000 + COUNT), "same"))
    verdicts = [judge(engine, gentle, retention, fresh=nothing_new, cache=home / f"cache-{n}") for n in range(2)]
    for verdict in verdicts:
        assert verdict.outcome == "inconclusive"
        assert verdict.suites[0].decision == "passed"
        assert verdict.caught_by == ("gain",)
    assert verdicts[0].summary()["suites"] == verdicts[1].summary()["suites"]


def test_later_candidates_are_judged_more_strictly_and_on_the_hidden_half_of_what_a_recipe_was_tuned_on(
    engine: ClipEngine, retention: Suite, gentle: str
) -> None:
    plans = (AnalysisPlan.alone(0.05), AnalysisPlan(candidate_alpha(0.05, 5), 0.05, 50, candidates=5))
    first, fifth = (judge(engine, gentle, retention, plan=plan) for plan in plans)
    assert fifth.look.alpha < first.look.alpha / 20
    assert fifth.suites[0].ci_low < first.suites[0].ci_low, "a smaller level makes a wider interval"
    assert not first.spent and not fifth.spent, "without fresh samples nothing can pass"
    tuned = judge(engine, gentle, retention, meta={"tuned_on": ["known"]})
    assert tuned.suites[0].half == "hidden"
    assert tuned.suites[0].n == len(retention.half("hidden").items()) < COUNT


def test_a_model_that_answers_nan_in_the_engine_is_rejected_as_not_finite(
    home: Path, engine: ClipEngine, retention: Suite
) -> None:
    """A finite file can give a forward pass that is not: the weights are poisoned after the loader's checks."""
    name = load(engine, home, "overflow", seed=11, scale=0.1)
    running: Any = engine._residents[name].towers
    for layer in running._passes.module.get_submodule("visual").modules():
        if isinstance(layer, PackedLinear | nn.Linear) and layer.bias is not None:
            layer.bias = nn.Parameter(torch.full_like(layer.bias, float("inf")), requires_grad=False)
    verdict = judge(engine, name, retention)
    assert (verdict.outcome, verdict.caught_by) == ("rejected", ("finite",))
    assert verdict.suites == () and not verdict.spent


def test_a_candidate_that_breaks_the_engine_is_rejected_and_missing_data_are_an_error_of_the_suite(
    home: Path, engine: ClipEngine, retention: Suite, gentle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.encode_texts

    def break_for_candidate(texts: list[str], adapter: str | None = None) -> np.ndarray:
        if adapter == gentle:
            raise RuntimeError("out of memory")
        return original(texts, adapter)

    monkeypatch.setattr(engine, "encode_texts", break_for_candidate)
    verdict = judge(engine, gentle, retention)
    assert verdict.outcome == "rejected" and "out of memory" in verdict.reasons[0]
    (home / "gone.yaml").write_text("task: retrieval\ndata: ${home}/data/gone\n")
    with pytest.raises(GateError, match="does not exist"):
        judge(engine, gentle, load_suites([home / "gone.yaml"], home)[0])


def test_parity_compares_the_trainers_model_with_the_server(engine: ClipEngine, retention: Suite, gentle: str) -> None:
    def trainer_of(adapter: str | None) -> Any:
        return lambda pixels, texts: (engine.encode_images(pixels, adapter), engine.encode_texts(texts, adapter))

    same = judge(engine, gentle, retention, parity=trainer_of(gentle))
    assert next(check for check in same.checks if check.name == "parity").ok
    tiny_limit = judge(engine, gentle, retention, parity=trainer_of(None))
    assert (tiny_limit.outcome, "parity" in tiny_limit.caught_by) == ("rejected", True)
