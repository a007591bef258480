"""Whatever the recipe and the pools: batches have the shares that the recipe says, and pools are used evenly."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from updater.data.mixture import PARTS, plan_batches
from updater.recipes import Mixture, Part

BATCHES = 12


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
