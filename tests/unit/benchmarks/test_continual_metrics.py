"""The papers' figures on matrices whose answers are known by hand, and intervals against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.continual.chain import Unit
from benchmarks.continual.intervals import resampled
from benchmarks.continual.lead import leads
from benchmarks.continual.metrics import forgetting, geometric_mean, mtil, tic, trajectory
from benchmarks.continual.outcomes import Course, Reference

MATRIX = np.array([
    [0.9, 0.2, 0.3],
    [0.8, 0.7, 0.4],
    [0.6, 0.5, 1.0],
])  # fmt: skip


def test_means_of_both_kinds_of_suites_and_their_geometric_mean() -> None:
    path = trajectory(np.array([[0.2, 0.4], [0.4, 0.6]]), np.array([[0.6], [0.32]]))
    assert path.a_ka.tolist() == pytest.approx([0.3, 0.5])
    assert path.a_zs.tolist() == pytest.approx([0.6, 0.32])
    assert path.gm.tolist() == pytest.approx([math.sqrt(0.18), 0.4])
    assert geometric_mean(np.array([0.0]), np.array([1.0]))[0] == 0


def test_transfer_is_what_a_suite_scored_before_its_own_update() -> None:
    found = mtil(MATRIX)
    assert found.transfer == pytest.approx((0.2 + (0.3 + 0.4) / 2) / 2)
    assert found.average == pytest.approx((0.9 + 0.2 + 0.3 + 0.8 + 0.7 + 0.4 + 0.6 + 0.5 + 1.0) / 9)
    assert found.last == pytest.approx((0.6 + 0.5 + 1.0) / 3)
    with pytest.raises(ValueError, match="two suites"):
        mtil(MATRIX[:, :1])


def test_in_domain_backward_and_forward_are_the_diagonal_and_the_two_triangles() -> None:
    found = tic(MATRIX)
    assert found.in_domain == pytest.approx((0.9 + 0.7 + 1.0) / 3)
    assert found.backward == pytest.approx((0.8 + 0.6 + 0.5) / 3)
    assert found.forward == pytest.approx((0.2 + 0.3 + 0.4) / 3)
    with pytest.raises(ValueError, match="two updates"):
        tic(MATRIX[:1])


def test_forgetting_is_the_share_of_what_was_learned_that_later_updates_take() -> None:
    path = np.array([
        [0.5, 0.2, 0.3],
        [0.9, 0.2, 0.3],
        [0.8, 0.4, 0.3],
        [0.725, 0.35, 0.3],
    ])  # fmt: skip
    sums = forgetting(path)
    assert sums[:, 1] == pytest.approx([0.4**2 + 0.3**2, 0.2**2, 0]), "the last was not learned, and is the last"
    lost, squared = sums.sum(axis=0)
    assert lost / squared == pytest.approx(0.25)
    assert not forgetting(path[:2]).any()


def test_draws_take_the_same_items_for_all_methods() -> None:
    rng = np.random.default_rng(0)
    one = {"a": rng.random(20), "b": rng.random(10), "z": rng.random(15)}
    worse = {name: hits - 0.25 for name, hits in one.items()}
    asked = Reference(one, ("a", "b"), ("z",), one)
    draws = resampled({"base": one, "worse": worse}, asked, draws=200)
    found = draws.difference("a_ka", "worse", "base")
    assert (found.value, found.low, found.high) == pytest.approx((-25, -25, -25))
    assert found.clear
    gm = draws.difference("gm", "worse", "base")
    learned, kept = (one["a"].mean() + one["b"].mean()) / 2, one["z"].mean()
    plain = 100 * (math.sqrt((learned - 0.25) * (kept - 0.25)) - math.sqrt(learned * kept))
    assert gm.value == pytest.approx(plain)


def test_an_interval_is_as_wide_as_that_of_drawing_items_one_by_one() -> None:
    rng = np.random.default_rng(1)
    base = {"a": (rng.random(30) < 0.5).astype(float), "z": np.ones(5)}
    other = {"a": (rng.random(30) < 0.6).astype(float), "z": np.ones(5)}
    found = resampled({"base": base, "other": other}, Reference(base, ("a",), ("z",), base)).difference(
        "a_ka", "other", "base"
    )
    means = []
    for _ in range(4000):
        rows = [int(rng.integers(30)) for _ in range(30)]
        means.append(100 * sum(other["a"][row] - base["a"][row] for row in rows) / 30)
    means.sort()
    assert found.low == pytest.approx(means[100], abs=3.5)
    assert found.high == pytest.approx(means[-100], abs=3.5)
    assert found.clear == (found.low > 0 or found.high < 0)


def test_a_figure_without_its_largest_suite_is_that_of_the_others() -> None:
    base = {name: np.full(4, 0.5) for name in "abz"}
    better = {"a": np.full(4, 0.9), "b": np.full(4, 0.6), "z": np.full(4, 0.5)}
    reference = Reference(base, ("a", "b"), ("z",), base, frozenset("b"), ("z",))
    draws = resampled({"base": base, "better": better}, reference, draws=20)
    assert draws.largest("better", "base") == "a"
    assert draws.difference("a_ka", "better", "base").value == pytest.approx(25)
    assert draws.difference("a_ka", "better", "base", "a").value == pytest.approx(10)
    assert draws.difference("gm", "better", "base", "a").value == pytest.approx(100 * (math.sqrt(0.6 * 0.5) - 0.5))
    assert draws.difference("classes", "better", "base").value == pytest.approx(10)
    assert draws.difference("retrieval", "better", "base").value == pytest.approx(40)


def test_a_lead_is_the_mean_over_bases_of_the_chains_that_both_have() -> None:
    def course(name: str, order: int, learned: float) -> Course:
        hits = {"a": np.full(4, learned), "b": np.full(4, 0.5), "z": np.full(4, 0.64)}
        return Course(Unit(name, order), (base, hits), ())

    base = {"a": np.full(4, 0.5), "b": np.full(4, 0.5), "z": np.full(4, 0.64)}
    reference = Reference(base, ("a", "b"), ("z",), base, outside=("z",))
    first = {"default": [course("default", 0, 0.9), course("default", 1, 0.1)], "other": [course("other", 0, 0.7)]}
    second = {"default": [course("default", 0, 0.7)], "other": [course("other", 0, 0.7), course("other", 3, 0.0)]}
    all_leads = leads({"one": (reference, first), "two": (reference, second)})
    lead = all_leads["other"]
    gap = 100 * (math.sqrt(0.7 * 0.64) - math.sqrt(0.6 * 0.64)) / 2
    assert lead["gm"]["value"] == pytest.approx(gap, abs=0.01) and lead["gm"]["clear"]
    assert lead["gm_without_largest"]["value"] == 0 and lead["largest"] == ["a"]
    assert lead["chains"] == 2 and lead["orders"] == ["listed"]
    gained = 100 * (math.sqrt(0.5 * 0.64) + math.sqrt(0.6 * 0.64)) / 2 - 100 * math.sqrt(0.5 * 0.64)
    assert all_leads["zero-shot"]["gm"]["value"] == pytest.approx(gained, abs=0.01)
    assert all_leads["zero-shot"]["outside"]["value"] == 0 and all_leads["zero-shot"]["chains"] == 3
