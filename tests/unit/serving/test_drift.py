"""The drift statistics: what they say of samples of one distribution, and of two."""

from __future__ import annotations

import numpy as np
import pytest

from serving.catalog.watch import Moments, frechet_distance, mean_shift

DIM = 64


def windows(shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> tuple[Moments, Moments]:
    """512 and 128 vectors; dimensions depend on each other, as those of embeddings do."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    before = random.normal(size=(512, DIM)) @ mixing
    now = random.normal(size=(128, DIM)) @ mixing * scale + shift
    return Moments.of(before.astype(np.float32)), Moments.of(now.astype(np.float32))


def test_without_drift_the_mean_shift_is_about_one() -> None:
    squares = [mean_shift(*windows(seed=seed)) ** 2 for seed in range(40)]
    assert np.mean(squares) == pytest.approx(1.0, abs=0.1)


def test_another_mean_is_seen_by_both_and_grows_with_the_shift() -> None:
    calm, little, much = windows(), windows(shift=0.5), windows(shift=2.0)
    assert mean_shift(*calm) < 1.5 < 4 < mean_shift(*little) < mean_shift(*much)
    assert frechet_distance(*calm) < frechet_distance(*little) < frechet_distance(*much)
    assert frechet_distance(*much) == pytest.approx(DIM * 2.0**2, rel=0.1)


def test_another_spread_with_the_same_mean_is_seen_by_the_frechet_distance() -> None:
    calm, wide = windows(), windows(scale=2.0)
    assert frechet_distance(*wide) > 5 * frechet_distance(*calm)


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    one = Moments(10, np.array([0.0, 1.0]), np.array([1.0, 4.0]))
    other = Moments(10, np.array([3.0, 1.0]), np.array([4.0, 9.0]))
    assert frechet_distance(one, other) == pytest.approx(3.0**2 + (1 - 2) ** 2 + (2 - 3) ** 2)
    assert frechet_distance(one, one) == 0


def test_vectors_that_are_all_the_same_show_no_shift() -> None:
    same = Moments.of(np.ones((16, 4), np.float32))
    assert mean_shift(same, same) == 0
