"""The nearest mean against a loop, and that it does not matter how samples are cut into updates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.continual.baselines import NearestMean
from core.errors import TrainingError

CLASSES = ("ant", "bee", "cat")


def samples(count: int, spread: float, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Float32 features around a direction per class, of any length."""
    made = np.random.default_rng(seed)
    labels = [CLASSES[i % 3] for i in range(count)]
    centres = np.random.default_rng(7).normal(size=(3, 8))
    rows = np.stack([centres[i % 3] + spread * made.normal(size=8) for i in range(count)])
    return (rows * made.uniform(0.5, 3, size=(count, 1))).astype(np.float32), labels


def _plain(train: np.ndarray, labels: list[str], rows: np.ndarray) -> list[str]:
    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(sum(value * value for value in row))
        return [value / length for value in row]

    means = {}
    for name in CLASSES:
        own = [unit(row.tolist()) for row, label in zip(train, labels, strict=True) if label == name]
        means[name] = [sum(column) / len(own) for column in zip(*own, strict=True)]
    found = []
    for row in rows.tolist():
        distance = {
            name: sum((a - b) ** 2 for a, b in zip(unit(row), unit(mean), strict=True)) for name, mean in means.items()
        }
        found.append(min(distance, key=lambda name: distance[name]))
    return found


def test_it_predicts_what_a_loop_over_distances_predicts() -> None:
    train, labels = samples(40, spread=2.0)
    rows, _ = samples(60, spread=2.0, seed=1)
    means = NearestMean()
    means.update(train, labels)
    expected = _plain(train, labels, rows)
    assert set(expected) == set(CLASSES)
    assert means.predict(rows) == expected


def test_updates_in_any_cut_and_order_come_to_the_means_of_all_samples() -> None:
    train, labels = samples(41, spread=1.0)
    whole, parts = NearestMean(), NearestMean()
    whole.update(train, labels)
    for rows in reversed(np.array_split(np.arange(41), 7)):
        parts.update(train[rows], [labels[row] for row in rows])
    assert parts.classes == list(CLASSES)
    assert np.allclose(parts.means, whole.means, rtol=0, atol=1e-15)


def test_a_class_that_comes_later_leaves_the_earlier_ones_where_they_were() -> None:
    train, labels = samples(60, spread=0.3)
    rows, truth = samples(60, spread=0.3, seed=1)
    means = NearestMean()
    first = [i for i, label in enumerate(labels) if label != "cat"]
    means.update(train[first], [labels[i] for i in first])
    before = means.means
    assert "cat" not in means.predict(rows)
    later = [i for i, label in enumerate(labels) if label == "cat"]
    means.update(train[later], ["cat"] * len(later))
    assert np.array_equal(means.means[:2], before)
    assert np.mean([a == b for a, b in zip(means.predict(rows), truth, strict=True)]) > 0.95


def test_what_cannot_be_learned_is_refused() -> None:
    means = NearestMean()
    with pytest.raises(TrainingError, match="no class"):
        means.predict(np.ones((1, 8)))
    means.update(np.ones((1, 8)), ["ant"])
    for features, labels in ((np.ones((2, 8)), ["ant"]), (np.ones((1, 7)), ["ant"])):
        with pytest.raises(TrainingError, match="do not go with"):
            means.update(features, labels)
    for value in (0.0, np.nan, np.inf):
        with pytest.raises(TrainingError, match="not finite or 0"):
            means.update(np.full((1, 8), value), ["ant"])
    assert means.means.shape == (1, 8)
