"""Batches: whatever the recipe and the pools, they have the shares that the recipe says, and use pools evenly, in an
order that is a pure function of seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updater.data.mixture import PARTS, plan_batches
from updater.recipes import Mixture, Part

BATCHES = 12
SIZES: dict[Part, int] = {"new": 50, "reference": 70, "replay": 30}


def mixtures() -> st.SearchStrategy[Mixture]:
    weights = st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50))
    return weights.map(
        lambda each: Mixture(new=each[0] / sum(each), reference=each[1] / sum(each), replay=each[2] / sum(each))
    )


def sizes() -> st.SearchStrategy[dict[Part, int]]:
    other = st.integers(0, 40)
    return st.builds(lambda d, p, b: {"new": d, "reference": p, "replay": b}, st.integers(1, 40), other, other)


def wanted(mixture: Mixture, pools: dict[Part, int]) -> dict[Part, float]:
    """The shares, those of empty pools given away: P and B inherit from each other, and D from both."""
    if pools["reference"] == 0 and pools["replay"] == 0:
        return {"new": 1.0, "reference": 0.0, "replay": 0.0}
    held = mixture.reference + mixture.replay
    if pools["replay"] == 0:
        return {"new": mixture.new, "reference": held, "replay": 0.0}
    if pools["reference"] == 0:
        return {"new": mixture.new, "reference": 0.0, "replay": held}
    return {"new": mixture.new, "reference": mixture.reference, "replay": mixture.replay}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(mixtures(), sizes(), st.integers(2, 100), st.integers(0, 5))
def test_every_batch_has_its_size_and_its_shares_within_one_row(
    mixture: Mixture, pools: dict[Part, int], size: int, seed: int
) -> None:
    plan = plan_batches(mixture, size, pools, seed)
    shares = wanted(mixture, pools)
    for step in range(BATCHES):
        seen = Counter(part for part, _ in plan.batch(step))
        assert seen.total() == plan.rows == size
        assert seen["new"] >= 1
        for part in PARTS:
            assert abs(seen[part] - size * shares[part]) < 1 + 1e-9
            assert pools[part] or not seen[part]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixtures(), sizes(), st.integers(2, 60), st.integers(0, 5))
def test_each_row_of_a_pool_is_seen_equally_often_within_one(
    mixture: Mixture, pools: dict[Part, int], size: int, seed: int
) -> None:
    plan = plan_batches(mixture, size, pools, seed)
    seen: Counter[tuple[Part, int]] = Counter()
    for step in range(BATCHES):
        seen.update(plan.batch(step))
        for part in plan.counts:
            times = [seen[part, row] for row in range(pools[part])]
            assert max(times) - min(times) <= 1
    assert seen.total() == BATCHES * size


@pytest.mark.parametrize(
    ("empty", "counts"),
    [
        ((), {"new": 34, "reference": 33, "replay": 33}),
        (("replay",), {"new": 34, "reference": 66}),
        (("reference",), {"new": 34, "replay": 66}),
        (("reference", "replay"), {"new": 100}),
    ],
)
def test_the_share_of_an_empty_pool_goes_to_the_other_one(empty: tuple[Part, ...], counts: dict[Part, int]) -> None:
    sizes = {**SIZES, **dict.fromkeys(empty, 0)}
    assert plan_batches(Mixture(), 100, sizes, seed=1).counts == counts


def test_nothing_new_is_an_error() -> None:
    with pytest.raises(ValueError, match="no new rows"):
        plan_batches(Mixture(), 99, {**SIZES, "new": 0}, seed=1)


def test_each_epoch_goes_through_every_row_once_in_another_order() -> None:
    plan = plan_batches(Mixture(reference=0, new=1, replay=0), 10, {"new": 50, "reference": 0, "replay": 0}, seed=1)
    epochs = [[row for step in range(e * 5, e * 5 + 5) for _, row in plan.batch(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]


def test_steps_visit_the_first_rows_of_a_pool_however_many_follow() -> None:
    mixture = Mixture(reference=0, new=1, replay=0)
    short, long = (plan_batches(mixture, 10, {"new": n, "reference": 0, "replay": 0}, seed=1) for n in (30, 10**9))
    assert [short.batch(step) for step in range(3)] == [long.batch(step) for step in range(3)]
    assert {row for step in range(3) for _, row in long.batch(step)} == set(range(long.visited("new", 3)))
    assert (short.visited("new", 9), long.visited("new", 9), long.visited("replay", 9)) == (30, 90, 0)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = (plan_batches(Mixture(), 30, SIZES, seed=5) for _ in range(2))
    assert one.batch(7) == other.batch(7)
    assert one.batch(7) != one.batch(8)
    assert one.batch(7) != plan_batches(Mixture(), 30, SIZES, seed=6).batch(7)
