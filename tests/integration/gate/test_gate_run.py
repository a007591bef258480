"""Whole gate runs through the real engine.

The tiny base is random, so the questions are fitted to its answers: captions are assigned so that one model finds them
(an assignment over its similarities). A model trained on them has really improved, and one trained away from them has
really lost.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
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

SETTINGS = Gate(margin=0.1, mean_margin=0.1, trusted_sources=["*"])
COUNT = 160


@dataclass
class World:
    """A home and its engine; ``known`` is a retention suite whose captions the base finds, ``gentle`` an adapter that
    changes little.
    """

    home: Path
    engine: ClipEngine

    def __post_init__(self) -> None:
        self.known = self.folder_suite("known", first=0)
        self.gentle = self.load("gentle", seed=1, scale=0.02)

    def load(self, name: str, seed: int, scale: float) -> str:
        adapter = tiny_adapter(self.engine.base, self.home / name, seed, scale)
        self.engine.load(adapter, self.home / name)
        return adapter

    def deal(self, adapter: str | None, first: int, words: str) -> list[tuple[bytes, str]]:
        """Assign captions to pictures so that a model finds as many as it can."""
        images = [picture(seed) for seed in range(first, first + COUNT)]
        texts = [f"{words} {chr(97 + i % 26)}{i}" for i in range(COUNT)]
        pixels = np.stack([self.engine.base.preprocess.pixels(image) for image in images])
        shown, said = self.engine.encode_images(pixels, adapter), self.engine.encode_texts(texts, adapter)
        _, best = linear_sum_assignment(-(shown - shown.mean(axis=0)) @ (said - said.mean(axis=0)).T)
        return [(image, texts[i]) for image, i in zip(images, best, strict=True)]

    def folder_suite(self, name: str, first: int, adapter: str | None = None) -> Suite:
        folder = self.home / "data" / name
        folder.mkdir(parents=True)
        with (folder / "data.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "text"])
            for i, (image, text) in enumerate(self.deal(adapter, first, name)):
                (folder / f"{i}.png").write_bytes(image)
                writer.writerow([f"{i}.png", text])
        return self.suite(name, "metric: recall@10\nmargin: 0.1\n")

    def suite(self, name: str, more: str = "") -> Suite:
        path = self.home / f"{name}.yaml"
        path.write_text(f"task: retrieval\ndata: ${{home}}/data/{name}\n{more}")
        return load_suites([path], self.home)[0]

    def gain_suite(self, adapter: str | None, first: int) -> Suite:
        """Captions that this model finds."""
        pairs = self.deal(adapter, first, "new")
        rows = sample_rows(COUNT, "new", [text for _, text in pairs])
        return fresh_suite(rows.set_column(1, "image", [[image for image, _ in pairs]]))

    def judge(self, candidate: str, suite: Suite | None = None, fresh: Sequence[Suite] = (), **how: Any) -> Verdict:
        """Run the gate once; ``parity`` and ``cache`` are the evaluator's."""
        own = {name: how.pop(name) for name in ("parity", "cache") if name in how}
        how = {"incumbent": None, "plan": AnalysisPlan.alone(SETTINGS.alpha), "settings": SETTINGS} | how
        evaluator = ClipEvaluator(self.engine, **own)
        return run_gate(evaluator=evaluator, candidate=candidate, suites=[suite or self.known], fresh=fresh, **how)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("home")
    return World(home, ClipEngine(tiny_base(home), threads=1))


def test_a_candidate_that_forgets_is_rejected_by_the_suite_it_forgot(world: World) -> None:
    harsh = world.load("harsh", seed=2, scale=0.7)
    verdict = world.judge(harsh, fresh=[world.gain_suite(harsh, 1000)])
    known, new = verdict.suites
    assert (verdict.outcome, verdict.caught_by) == ("rejected", ("known", "mean loss"))
    assert known.decision == "failed" and known.ci_high < 0
    assert new.decision == "passed", "it did learn: retention alone kept it out"
    assert known.worst and all(w.rank_after >= 10 > w.rank_before for w in known.worst)
    assert all(w.thumbnail.startswith("data:image/jpeg;base64,") for w in known.worst)
    beside = verdict.diagnostics
    assert beside.warnings == () and beside.shift is not None and beside.tail is None
    assert beside.shift.towers["image"].from_base == beside.shift.towers["image"].from_incumbent > 0
    assert beside.pairs["known"].n >= 5 and beside.pairs["known"].score.before == beside.pairs["known"].base


def test_a_candidate_that_learns_and_forgets_nothing_passes(world: World) -> None:
    """The text tower is unchanged and images change a little: old captions stay found, the new ones are found
    better.
    """
    incumbent = world.load("other", seed=5, scale=0.7)
    kept, learnt = world.folder_suite("kept", 2000), world.gain_suite(world.gentle, 3000)
    verdict = world.judge(world.gentle, kept, [learnt], incumbent=incumbent)
    assert verdict.outcome == "passed", verdict.reasons
    assert verdict.caught_by == () and verdict.spent
    assert [s.decision for s in verdict.suites] == ["passed", "passed"]


def test_a_gain_on_labels_that_the_base_does_not_agree_with_is_held_until_their_source_is_trusted(world: World) -> None:
    """An adapter far from the base finds captions that the base finds no more often than by chance."""
    far = world.load("far", seed=5, scale=0.7)
    kept, learnt = world.folder_suite("far", 5000, far), world.gain_suite(far, 6000)
    doubting = SETTINGS.model_copy(update={"trusted_sources": []})
    held, trusted = (world.judge(far, kept, [learnt], settings=each) for each in (doubting, SETTINGS))
    assert (held.outcome, held.caught_by) == ("inconclusive", ("sources",)), held.reasons
    assert trusted.outcome == "passed" and held.summary()["trust"][0]["held"]


def test_a_candidate_like_the_incumbent_is_inconclusive_and_the_same_again(world: World) -> None:
    nothing_new = world.gain_suite(None, 4000)
    verdicts = [world.judge(world.gentle, fresh=[nothing_new], cache=world.home / f"cache-{n}") for n in range(2)]
    for verdict in verdicts:
        assert (verdict.outcome, verdict.caught_by) == ("inconclusive", ("gain",))
        assert verdict.suites[0].decision == "passed"
    assert verdicts[0].summary()["suites"] == verdicts[1].summary()["suites"]


def test_later_candidates_are_judged_more_strictly_and_on_the_hidden_half_of_what_a_recipe_was_tuned_on(
    world: World,
) -> None:
    plans = (AnalysisPlan.alone(0.05), AnalysisPlan(candidate_alpha(0.05, 5), 0.05, 50, candidates=5))
    first, fifth = (world.judge(world.gentle, plan=plan) for plan in plans)
    assert fifth.look.alpha < first.look.alpha / 20
    assert fifth.suites[0].ci_low < first.suites[0].ci_low, "a smaller level makes a wider interval"
    assert not first.spent and not fifth.spent, "without fresh samples nothing can pass"
    tuned = world.judge(world.gentle, meta={"tuned_on": ["known"]})
    assert tuned.suites[0].half == "hidden"
    assert tuned.suites[0].n == len(world.known.half("hidden").items()) < COUNT


def test_a_model_that_answers_nan_in_the_engine_is_rejected_as_not_finite(world: World) -> None:
    """A finite file can give a forward pass that is not: the weights are poisoned after the loader's checks."""
    name = world.load("overflow", seed=11, scale=0.1)
    running: Any = world.engine._residents[name].towers
    for layer in running._passes.module.get_submodule("visual").modules():
        if isinstance(layer, PackedLinear | nn.Linear) and layer.bias is not None:
            layer.bias = nn.Parameter(torch.full_like(layer.bias, float("inf")), requires_grad=False)
    verdict = world.judge(name)
    assert (verdict.outcome, verdict.caught_by) == ("rejected", ("finite",))
    assert verdict.suites == () and not verdict.spent


def test_a_candidate_that_breaks_the_engine_is_rejected_and_missing_data_are_an_error_of_the_suite(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = world.engine.encode_texts

    def break_for_candidate(texts: list[str], adapter: str | None = None) -> np.ndarray:
        if adapter == world.gentle:
            raise RuntimeError("out of memory")
        return original(texts, adapter)

    monkeypatch.setattr(world.engine, "encode_texts", break_for_candidate)
    verdict = world.judge(world.gentle)
    assert verdict.outcome == "rejected" and "out of memory" in verdict.reasons[0]
    with pytest.raises(GateError, match="does not exist"):
        world.judge(world.gentle, world.suite("gone"))


def test_parity_compares_the_trainers_model_with_the_server(world: World) -> None:
    def trainer_of(adapter: str | None) -> Any:
        encode = world.engine
        return lambda pixels, texts: (encode.encode_images(pixels, adapter), encode.encode_texts(texts, adapter))

    same = world.judge(world.gentle, parity=trainer_of(world.gentle))
    assert next(check for check in same.checks if check.name == "parity").ok
    other = world.judge(world.gentle, parity=trainer_of(None))
    assert other.outcome == "rejected" and "parity" in other.caught_by
