from __future__ import annotations

import numpy as np
import pytest

from updater.heads import KNOWN, Labelled, fit_head

CLASSES, DIM = 4, 24


def points(count: int, seed: int, spread: float = 0.35) -> tuple[np.ndarray, list[str]]:
    """Unit vectors around a point for each class, with more noise in some directions than in others."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(CLASSES, DIM))
    y = np.arange(count) % CLASSES
    noise = random.normal(size=(count, DIM)) * np.geomspace(4, 0.5, DIM)
    x = centers[y] + spread * noise
    return x / np.linalg.norm(x, axis=1, keepdims=True), [f"class {number}" for number in y]


def accuracy(head: object, x: np.ndarray, labels: list[str]) -> float:
    answers = head.classify(x).probabilities  # type: ignore[attr-defined]
    return float(np.mean([head.labels[row.argmax()] == label for row, label in zip(answers, labels, strict=True)]))  # type: ignore[attr-defined]


def test_the_shared_covariance_tells_apart_what_the_nearest_mean_does_not_and_is_as_sure_as_it_is_right() -> None:
    head = fit_head(*points(160, seed=0, spread=0.8))
    unseen, right = points(2000, seed=1, spread=0.8)
    nearest = [head.labels[int((row @ head.means.T).argmax())] for row in unseen]
    correct = accuracy(head, unseen, right)
    assert correct > np.mean([a == b for a, b in zip(nearest, right, strict=True)]) + 0.02
    assert head.counts == (40,) * CLASSES and head.labels == tuple(sorted(set(right)))
    assert head.classify(unseen).probabilities.max(axis=1).mean() == pytest.approx(correct, abs=0.06)


def test_of_known_classes_as_many_pass_as_were_to_and_strangers_do_not() -> None:
    head = fit_head(*points(400, seed=0, spread=0.2))
    unseen, _ = points(1000, seed=1, spread=0.2)
    assert float((head.classify(unseen).distance <= 1).mean()) == pytest.approx(KNOWN, abs=0.05)
    strangers = np.random.default_rng(5).normal(size=(500, DIM))
    strangers /= np.linalg.norm(strangers, axis=1, keepdims=True)
    assert float((head.classify(strangers).distance <= 1).mean()) < 0.2


def test_fewer_images_than_dimensions_are_enough_and_the_same_give_the_same() -> None:
    x, labels = points(12, seed=0)
    head, again = fit_head(x, labels), fit_head(x[::1], labels)
    assert np.isfinite(head.precision).all() and np.array_equal(head.precision, again.precision)
    assert np.linalg.eigvalsh(head.precision.astype(np.float64)).min() > 0
    with pytest.raises(ValueError, match="two classes"):
        fit_head(x[:1], labels[:1])
    with pytest.raises(ValueError, match="'class 3' has one image"):
        fit_head(x[:8], ["class 1"] * 4 + ["class 2"] * 3 + ["class 3"])


def test_a_draw_is_balanced_and_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [(f"{label}{number}".encode(), f"{label}{number}", number) for label in "ab" for number in range(9)]
    rows += [(b"c0", "c0", 0)]
    found, turned = Labelled(), Labelled()
    for some, ordered in ((found, rows), (turned, rows[::-1])):
        for key, name, place in ordered:
            some.rows[name[0]].append((key, name, place))
    drawn = found.drawn(most=8, least=2)
    assert [label for label, _, _ in drawn] == ["a"] * 4 + ["b"] * 4
    assert turned.drawn(most=8, least=2) == drawn
