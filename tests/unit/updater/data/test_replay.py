"""The replay reservoir: bounded, balanced, and a pure function of rows and seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from updater.data.draw import decayed_counts, draw_key, reservoir_order
from updater.recipes import load_recipe


def rows(**counts: int) -> list[str]:
    """Ids of rows of some concepts, oldest first."""
    return [f"{concept}-{i}" for concept, count in counts.items() for i in range(count)]


def reservoir(ids: list[str], capacity: int, half_life: float, seed: int, balanced: bool = True) -> list[str]:
    keys = np.fromiter((draw_key(name, seed) for name in ids), np.uint64, len(ids))
    order = reservoir_order(keys, [name.split("-")[0] for name in ids], capacity, half_life, balanced)
    return [ids[number] for number in order]


def test_everything_is_kept_while_it_fits() -> None:
    few = rows(cat=3, dog=4)
    assert sorted(reservoir(few, 7, 100, seed=0)) == sorted(few)


def test_a_part_of_the_draw_is_a_smaller_draw() -> None:
    """So an update that visits fewer rows visits a reservoir of fewer."""
    many = rows(cat=300, dog=40)
    assert reservoir(many, 100, 50, seed=0)[:30] == reservoir(many, 30, 50, seed=0)


def test_a_rare_concept_is_not_drowned_by_a_common_one() -> None:
    """900 cats and 100 dogs into 100 places: drawn evenly over rows that would be 10 dogs; balanced it is about 50."""
    kept = reservoir(rows(cat=900, dog=100), 100, half_life=1e9, seed=0)
    assert len(kept) == len(set(kept)) == 100
    dogs = Counter(name.split("-")[0] for name in kept)["dog"]
    assert 35 <= dogs <= 60


def test_an_unbalanced_draw_is_uniform_over_rows() -> None:
    """Whatever its concept, each of 100 rows is among the 20 drawn one time in five."""
    many = rows(cat=90, dog=10)
    seeds = 400
    drawn = Counter(name for seed in range(seeds) for name in reservoir(many, 20, 50, seed, balanced=False))
    expected, deviation = seeds * 0.2, (seeds * 0.2 * 0.8) ** 0.5
    assert sum(drawn.values()) == 20 * seeds
    # Chi-square over 99 degrees of freedom, within five standard deviations of its mean on either side.
    chi_square = sum(((drawn[name] - expected) / deviation) ** 2 for name in many) * 0.99
    assert abs(chi_square - 99) < 5 * (2 * 99) ** 0.5
    dogs = sum(count for name, count in drawn.items() if name.startswith("dog"))
    assert dogs / seeds == pytest.approx(2, abs=0.25)


def test_the_draw_depends_on_rows_and_seed_alone() -> None:
    many = rows(cat=200, dog=50)
    assert reservoir(many, 40, 100, seed=1) == reservoir(list(many), 40, 100, seed=1)
    assert reservoir(many, 40, 100, seed=1) != reservoir(many, 40, 100, seed=2)


def test_tiny_reservoirs_work() -> None:
    assert reservoir(rows(cat=3), 0, 10, seed=0) == []
    assert len(reservoir(rows(cat=3), 1, 10, seed=0)) == 1


def test_the_replay_recipes_differ_in_the_draw_alone() -> None:
    plain, balanced = (load_recipe(name).model_dump() for name in ("replay", "balanced-replay"))
    assert {key for key in plain if plain[key] != balanced[key]} == {"name", "description", "replay_balanced"}


def test_most_of_the_buffer_stays_when_the_stream_grows() -> None:
    before = set(reservoir(rows(cat=400, dog=400), 100, 1e9, seed=1))
    after = set(reservoir(rows(cat=400, dog=400) + [f"cat-new-{i}" for i in range(20)], 100, 1e9, seed=1))
    assert len(before & after) > 80


def test_counts_are_halved_after_a_half_life() -> None:
    old = ["a"] * 10 + ["b"] * 10
    counts = decayed_counts(old, half_life=10)
    newest = sum(0.5 ** (i / 10) for i in range(10))
    assert counts["b"] == pytest.approx(newest)
    assert counts["a"] == pytest.approx(newest / 2)
