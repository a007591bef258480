"""Batches: shares, empty pools, and the order as a pure function."""

from __future__ import annotations

from collections import Counter

import pytest

from updater.data.mixture import plan_batches
from updater.recipes import Mixture, Part

SIZES: dict[Part, int] = {"new": 50, "reference": 70, "replay": 30}


def counts(sizes: dict[Part, int], size: int = 99) -> dict[Part, int]:
    return dict(plan_batches(Mixture(), size, sizes, seed=1).counts)


def test_a_batch_is_divided_by_the_shares() -> None:
    assert counts(SIZES, 100) == {"new": 34, "reference": 33, "replay": 33}


def test_the_share_of_an_empty_pool_goes_to_the_other_one() -> None:
    assert counts({**SIZES, "replay": 0}, 100) == {"new": 34, "reference": 66}
    assert counts({**SIZES, "reference": 0}, 100) == {"new": 34, "replay": 66}
    assert counts({**SIZES, "reference": 0, "replay": 0}, 100) == {"new": 100}


def test_nothing_new_is_an_error() -> None:
    with pytest.raises(ValueError, match="no new rows"):
        counts({**SIZES, "new": 0})


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


def test_a_pool_smaller_than_its_share_is_repeated_within_a_batch() -> None:
    plan = plan_batches(Mixture(), 99, {"new": 5, "reference": 70, "replay": 30}, seed=1)
    seen = Counter(row for part, row in plan.batch(0) if part == "new")
    assert set(seen) == set(range(5))
    assert max(seen.values()) - min(seen.values()) <= 1
