"""The papers' figures on matrices whose results are known by hand; intervals against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.continual.chain import Unit
from benchmarks.continual.intervals import resampled
from benchmarks.continual.lead import leads
from benchmarks.continual.metrics import forgetting, geometric_mean, mtil, tic, trajectory
from benchmarks.continual.outcomes import Course, Hits, Reference
from benchmarks.continual.repeated import beside, repeated

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


RNG = np.random.default_rng(0)
BASE: Hits = {name: (RNG.random(200) < 0.5).astype(float) for name in ("new", "old")}
ASKED = Reference(BASE, ("new",), ("old",), BASE)


def course(name: str, order: int, seed: int, gain: int, loss: int = 0, dip: int = 0) -> Course:
    """A stream of two updates: ``dip`` points lost after the first, and gain and loss at its end, in items."""

    def moved(suite: str, up: int, down: int) -> np.ndarray:
        hits = BASE[suite].copy()
        hits[np.flatnonzero(hits == 0)[:up]] = 1
        hits[np.flatnonzero(BASE[suite] == 1)[:down]] = 0
        return hits

    first = {"new": moved("new", 0, dip), "old": BASE["old"]}
    return Course(
        Unit(name, order, seed), (BASE, first, {"new": moved("new", gain, 0), "old": moved("old", 0, loss)}), ()
    )


def test_mean_and_spread_over_chains_and_the_mean_of_each_order() -> None:
    courses = [course("a", 0, 0, 20, loss=2), course("a", 0, 1, 40), course("a", 2, 0, 30, loss=4, dip=10)]
    found = repeated(courses, ASKED)
    assert found["chains"] == 3
    assert (found["a_ka_delta"], found["a_ka_sd"]) == (15.0, 5.0)
    assert found["a_zs_delta"] == -1.0
    assert {order: (means["a_ka"], means["a_zs"]) for order, means in found["by_order"].items()} == {
        "0": (15.0, -0.5), "2": (15.0, -2.0)
    }  # fmt: skip
    new, old = BASE["new"].mean(), BASE["old"].mean()
    assert found["gm_lowest"] == pytest.approx(100 * (np.sqrt((new - 0.05) * old) - np.sqrt(new * old)), abs=0.01)


def test_one_chain_has_no_spread() -> None:
    assert "gm_sd" not in repeated([course("a", 0, 0, 20)], ASKED)


def test_two_methods_are_compared_over_the_chains_that_both_have() -> None:
    ours = [course("a", 0, 0, 40), course("a", 1, 0, 40), course("a", 1, 1, 0, loss=50)]
    others = [course("b", 1, 0, 20), course("b", 0, 0, 20), course("b", 2, 0, 60)]
    found = beside(ours, others, ASKED)
    new, old = BASE["new"].mean(), BASE["old"].mean()
    assert found is not None
    assert found.value == pytest.approx(100 * (np.sqrt((new + 0.2) * old) - np.sqrt((new + 0.1) * old)))
    assert found.clear
    same = beside(ours[:2], ours[:2], ASKED)
    assert same is not None
    assert not same.clear
    assert beside(ours[2:], others, ASKED) is None


def test_each_order_is_compared_for_itself() -> None:
    standard = [course("a", 0, 0, 20), course("a", 0, 1, 20), course("a", 1, 0, 0)]
    found = repeated([course("b", 0, 0, 60), course("b", 0, 1, 60), course("b", 1, 0, 0)], ASKED, standard)
    first, second = (found["by_order"][order]["against_default"] for order in ("0", "1"))
    assert first["clear"]
    assert first["value"] == round(beside([course("b", 0, 0, 60)], standard[:1], ASKED).value, 2)  # type: ignore[union-attr]
    assert (second["value"], second["clear"]) == (0, False)
    assert first["value"] > found["against_default"]["value"] > 0
    assert repeated(standard, ASKED)["against_default"] is None
