from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.continual.cross_version import SHARES, apply, backfilled, cross_version_recall
from benchmarks.continual.evaluation import Encoded, Evaluator, Vectors
from benchmarks.continual.nearest import NearestMean, nearest_means
from benchmarks.continual.stream import Suite
from core.errors import TrainingError
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
    assert np.allclose(apply(turn.T, 3 * texts @ turn), texts, atol=1e-6)
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


def test_what_is_backfilled_stays_backfilled() -> None:
    done = [backfilled(41, share) for share in SHARES]
    assert [int(rows.sum()) for rows in done] == [0, 10, 20, 41]
    assert all((later | ~earlier).all() for earlier, later in pairwise(done))


def test_class_means_in_any_cut_and_order_are_those_of_all_samples() -> None:
    made = np.random.default_rng(0)
    centres = made.normal(size=(3, 8))
    rows = (centres[np.arange(60) % 3] + 2.0 * made.normal(size=(60, 8))) * made.uniform(0.5, 3, size=(60, 1))
    labels, unit = ["ant", "bee", "cat"] * 20, _unit(rows)
    whole, parts = NearestMean(), NearestMean()
    whole.update(rows, labels)
    for part in reversed(np.array_split(np.arange(60), 7)):
        parts.update(rows[part], [labels[row] for row in part])
    means = {name: unit[np.array(labels) == name].mean(axis=0) for name in whole.classes}
    plain = [min(means, key=lambda name, row=row: -row @ means[name] / np.linalg.norm(means[name])) for row in unit]
    assert set(plain) == {"ant", "bee", "cat"}
    assert whole.predict(rows) == parts.predict(rows) == plain
    assert np.allclose(parts.scores(rows), whole.scores(rows), rtol=0, atol=1e-12)
    for value in (0.0, np.nan, np.inf):
        with pytest.raises(TrainingError, match="not finite or 0"):
            parts.update(np.full((1, 8), value), ["ant"])


def test_class_means_answer_the_suites_whose_updates_have_classes(tmp_path: Path) -> None:
    plain = stream()
    evaluator = Evaluator(tiny_base(tmp_path), plain.suites)
    base = evaluator.encode(None)
    assert nearest_means(evaluator, plain, base) == {}
    boat = next(suite for suite in plain.suites if suite.name == "boat")
    lessons = tuple(replace(pair, label=pair.text.replace("boat", "new boat")) for pair in pairs("boat", 12))
    hits = nearest_means(evaluator, replace(plain, updates={**plain.updates, "boat": lessons}), base)
    assert list(hits) == ["boat"] and hits["boat"].shape == (len(boat.items), 1)
    features, labels = evaluator.features([pair.read() for pair in lessons]), np.array([pair.label for pair in lessons])
    own = {pair.label for pair in boat.items} & set(labels)
    means = {name: features[labels == name].mean(axis=0) for name in own}
    for row, pair in enumerate(boat.items):
        best = max(means, key=lambda name: float(base.images[pair.id] @ means[name] / np.linalg.norm(means[name])))
        assert hits["boat"][row, 0] == (best == pair.label)
