"""Searches across versions, and the classifier that trains nothing, against what must come out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.continual.cross_version import cross_version_recall
from benchmarks.continual.evaluation import Encoded, Evaluator, Vectors
from benchmarks.continual.nearest import nearest_means
from benchmarks.continual.stream import Stream, Suite
from tests.support.tiny import tiny_base
from tests.unit.benchmarks.builders import stream
from tests.unit.updater.builders import pairs

ITEMS = 64
DIM = 6


def _unit(rows: np.ndarray) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture
def suite() -> Suite:
    items = tuple(replace(pair, text=f"number {n}") for n, pair in enumerate(pairs("car", ITEMS)))
    return Suite("car", "adaptation", "retrieval", items)


def _encoded(suite: Suite, images: Vectors, texts: Vectors) -> Encoded:
    return Encoded(
        {pair.id: row for pair, row in zip(suite.items, images, strict=True)},
        {pair.text: row for pair, row in zip(suite.items, texts, strict=True)},
    )


def test_a_map_takes_new_queries_into_an_index_of_a_space_that_was_turned(suite: Suite) -> None:
    rng = np.random.default_rng(0)
    images = _unit(rng.normal(size=(ITEMS, DIM)))
    texts = _unit(images + 0.3 * rng.normal(size=(ITEMS, DIM)))
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    old, new = _encoded(suite, images, texts), _encoded(suite, images @ turn, texts @ turn)
    found = cross_version_recall([suite], old, new, old)
    assert found["old_old"] > 0.9
    assert found["new_at_1"] == found["mapped_at_1"] == pytest.approx(found["old_old"])
    assert found["new_at_0"] < 0.4 < found["new_at_0.5"] < found["old_old"]
    assert found["mapped_at_0"] == found["mapped_base"] == pytest.approx(found["old_old"])
    assert found["new_base"] == found["new_at_0"]


def test_a_search_in_the_old_index_is_a_plain_ranking(suite: Suite) -> None:
    rng = np.random.default_rng(1)
    old, new = (
        _encoded(suite, _unit(rng.normal(size=(ITEMS, DIM))), _unit(rng.normal(size=(ITEMS, DIM)))) for _ in range(2)
    )
    right = 0
    for pair in suite.items:
        ranked = sorted(suite.items, key=lambda other: -float(new.texts[pair.text] @ old.images[other.id]))
        right += pair.id in [other.id for other in ranked[:5]]
    assert cross_version_recall([suite], old, new, old)["new_at_0"] == pytest.approx(right / ITEMS)


def test_class_means_answer_the_suites_whose_updates_have_classes(tmp_path: Path) -> None:
    plain = stream()
    evaluator = Evaluator(tiny_base(tmp_path), plain.suites)
    base = evaluator.encode(None)
    assert nearest_means(evaluator, plain, base) == {}
    boat = next(suite for suite in plain.suites if suite.name == "boat")
    lessons = tuple(replace(pair, label=pair.text.replace("boat", "new boat")) for pair in pairs("boat", 12))
    taught = replace(plain, updates={**plain.updates, "boat": lessons})
    known = {pair.label for pair in taught.updates["boat"]}
    hits = nearest_means(evaluator, taught, base)
    assert list(hits) == ["boat"] and hits["boat"].shape == (len(boat.items), 1)
    features = {p.id: row for p, row in zip(taught.updates["boat"], _features(evaluator, taught), strict=True)}
    for row, pair in enumerate(boat.items):
        own = {other.label for other in boat.items} & known
        means = {
            name: np.mean([features[p.id] for p in taught.updates["boat"] if p.label == name], axis=0) for name in own
        }
        best = max(means, key=lambda name: float(base.images[pair.id] @ means[name] / np.linalg.norm(means[name])))
        assert hits["boat"][row, 0] == (best == pair.label)


def _features(evaluator: Evaluator, taught: Stream) -> Vectors:
    return evaluator.features([pair.read() for pair in taught.updates["boat"]])
