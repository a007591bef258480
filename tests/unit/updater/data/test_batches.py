from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines.clip_base import ClipBase
from serving.engines.preprocess import Preprocess
from tests.unit.updater.builders import pairs, picture, png, pools, recipe, resumed, run
from updater.data.mixture import PARTS, BatchPlan, plan_batches
from updater.data.pools import Pair, Pools, grouped, run_starts, visits
from updater.families.clip_learner import ClipLearner, phrased, view_pixels
from updater.recipes import Batches, Mixture, Part, Views


def sizes_of_pools() -> st.SearchStrategy[dict[Part, int]]:
    other = st.integers(0, 40)
    return st.builds(lambda d, p, b: {"new": d, "reference": p, "replay": b}, st.integers(1, 40), other, other)


def shares_of(weights: tuple[int, int, int], pools: dict[Part, int]) -> dict[Part, float]:
    """The shares, with those of empty pools given away: P and B inherit from each other, and D from both."""
    new, reference, replay = (weight / sum(weights) for weight in weights)
    if pools["reference"] == pools["replay"] == 0:
        return {"new": 1.0, "reference": 0.0, "replay": 0.0}
    if pools["replay"] == 0:
        return {"new": new, "reference": reference + replay, "replay": 0.0}
    if pools["reference"] == 0:
        return {"new": new, "reference": 0.0, "replay": reference + replay}
    return {"new": new, "reference": reference, "replay": replay}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50)),
    sizes_of_pools(),
    st.integers(2, 100),
    st.integers(0, 5),
)
def test_every_batch_has_its_size_and_shares_and_each_row_of_a_pool_is_seen_equally_often_within_one(
    weights: tuple[int, int, int], pools: dict[Part, int], size: int, seed: int
) -> None:
    new, reference, replay = (weight / sum(weights) for weight in weights)
    plan = plan_batches(Mixture(new=new, reference=reference, replay=replay), size, pools, seed)
    shares, seen = shares_of(weights, pools), Counter[tuple[Part, int]]()
    for step in range(12):
        batch = plan.batch(step)
        parts = Counter(part for part, _ in batch)
        assert len(batch) == plan.rows == size and parts["new"] >= 1
        for part in PARTS:
            assert abs(parts[part] - size * shares[part]) < 1 + 1e-9
            assert pools[part] or not parts[part]
        seen.update(batch)
        for part in plan.counts:
            times = [seen[part, row] for row in range(pools[part])]
            assert max(times) - min(times) <= 1


def new_alone(rows: int, seed: int = 1) -> BatchPlan:
    return plan_batches(Mixture(reference=0, new=1, replay=0), 10, {"new": rows, "reference": 0, "replay": 0}, seed)


def test_each_epoch_goes_through_every_row_once_in_another_order_of_the_seed() -> None:
    plan = new_alone(50)
    epochs = [[row for step in range(e * 5, e * 5 + 5) for _, row in plan.batch(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
    assert new_alone(50).batch(7) == plan.batch(7) != new_alone(50, seed=2).batch(7)
    with pytest.raises(ValueError, match="no new rows"):
        new_alone(0)


def test_steps_visit_the_first_rows_of_a_pool_however_many_follow() -> None:
    short, long = new_alone(30), new_alone(10**9)
    assert [short.batch(step) for step in range(3)] == [long.batch(step) for step in range(3)]
    assert {row for step in range(3) for _, row in long.batch(step)} == set(range(long.visited("new", 3)))
    assert (short.visited("new", 9), long.visited("new", 9), long.visited("replay", 9)) == (30, 90, 0)


MIXED = Batches()
TEMPLATES = ["a photo of a {}", "a drawing of a {}", "{}"]


def of_domains(names: str) -> tuple[Pair, ...]:
    return tuple(replace(pair, domain=name) for pair, name in zip(pairs("car", len(names)), names, strict=True))


def test_runs_are_of_one_domain_keep_its_order_and_are_visited_by_its_share() -> None:
    domains = np.random.default_rng(1).choice(["a", "b", "rare"], 200, p=[0.6, 0.37, 0.03]).tolist()
    order = grouped(domains, 8)
    assert sorted(order) == list(range(200))
    for name in "a", "b", "rare":
        own = [row for row in order if domains[row] == name]
        assert own == sorted(own)
    seen = [domains[row] for row in order]
    runs = [seen[start:end] for start, end in pairwise((*run_starts(seen, 8), 200))]
    assert all(len(set(run)) == 1 for run in runs)
    assert sum(len(run) == 8 for run in runs) >= 200 // 8 - 3
    domains = ["a", "b", "a", "c"] * 100
    first = Counter(domains[row] for row in grouped(domains, 10)[:200])
    assert all(abs(first[name] / 200 - share) <= 10 / 200 for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)))


def test_a_batch_is_made_of_runs_in_every_epoch() -> None:
    rows = visits(of_domains("abcd" * 12), 48, Views(), Batches(domains="grouped", group=6), "seed")
    names = [row.domain for row in rows]
    plan = BatchPlan({"new": 12}, {"new": 48}, seed=3, runs={"new": run_starts(names, 6)})
    batches = [[row for _, row in plan.batch(step)] for step in range(12)]
    for batch in batches:
        assert sorted(Counter(names[row] for row in batch).values()) in ([6, 6], [12])
    second, third = (list(chain.from_iterable(batches[first : first + 4])) for first in (4, 8))
    assert sorted(second) == sorted(third) == list(range(48)) and second != third
    mixed = visits(of_domains("abcd" * 12), 48, Views(), MIXED, "seed")
    assert [row.domain for row in mixed] == list("abcd" * 12)


def test_each_pass_over_a_pool_takes_the_next_view() -> None:
    rows = pairs("car", 5)
    assert visits(rows, 5, Views(count=3), MIXED, "s") == rows
    seen = visits(rows, 14, Views(count=3), MIXED, "s")
    assert [each.view for each in seen] == [0] * 5 + [1] * 5 + [2] * 4  # type: ignore[union-attr]
    assert {each.id for each in seen[5:10]} == {each.id for each in rows}
    assert [each.id for each in seen[5:10]] != [each.id for each in rows]
    assert visits(rows, 14, Views(count=3), MIXED, "s") == seen
    assert visits(rows, 99, Views(), MIXED, "s") == rows


def test_a_view_is_a_part_of_the_image_and_always_the_same() -> None:
    shape = Preprocess(size=32)
    pair = pairs("car", 1)[0]
    # A ramp shows where a crop is from: darker on the left and on top.
    image = ramp(120, 90)
    whole = view_pixels(shape, image, pair, Views(count=4))
    assert np.array_equal(whole, shape.pixels(image))
    for flip in (False, True):
        views = Views(count=4, area=0.25, flip=flip)
        seen = [view_pixels(shape, image, replace(pair, id=f"{number}", view=1), views) for number in range(12)]
        assert all(each.shape == (32, 32, 3) for each in seen)
        again = view_pixels(shape, image, replace(pair, id="3", view=1), views)
        assert np.array_equal(seen[3], again)
        assert len({each.tobytes() for each in seen}) == 12
        spreads = [int(each[:, -1, 0].mean()) - int(each[:, 0, 0].mean()) for each in seen]
        full = int(whole[:, -1, 0].mean()) - int(whole[:, 0, 0].mean())
        assert all(0.4 * full <= abs(spread) <= 1.1 * full for spread in spreads)
        assert (min(spreads) < 0 < max(spreads)) == flip


def ramp(width: int, height: int) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(20, 230, width)[None]
    pixels[..., 1] = np.linspace(20, 230, height)[:, None]
    return png(pixels)


def test_a_short_caption_is_put_into_a_template_by_its_id_and_view_and_stays_the_same_caption(base: ClipBase) -> None:
    pair = Pair("7", "red kite", lambda: picture(1))
    said = [phrased(replace(pair, view=view), TEMPLATES) for view in range(3)]
    assert sorted(said) == sorted(template.replace("{}", "red kite") for template in TEMPLATES)
    assert len({phrased(replace(pair, id=f"{number}"), TEMPLATES) for number in range(20)}) == 3
    long = replace(pair, text="a red kite over a field of wheat")
    assert phrased(long, TEMPLATES) == long.text
    assert phrased(replace(long, label=long.text), ["this is {}."]) == f"this is {long.text}."
    assert phrased(pair, ()) == "red kite"

    made, pool = ClipLearner(base, recipe(caption_templates=TEMPLATES), {}, seed=0), pools(new=12)
    made.prepare(pool.examples, pool.parts)
    assert len(set(made.texts[:12:6])) + len(set(made.texts[1:12:6])) > 2
    batch = made.batch([0, 6, 1])
    assert batch.caption[0] == batch.caption[1] != batch.caption[2]


def test_an_update_with_them_is_reproducible_and_goes_on_where_it_was_stopped(base: ClipBase, tmp_path: Path) -> None:
    pool = Pools(of_domains("ab" * 3), of_domains("xyz" * 2))
    views, grouped = {"count": 3, "area": 0.5, "flip": True}, {"domains": "grouped", "group": 2}
    plan = recipe(max_steps=3, views=views, batches=grouped, caption_templates=TEMPLATES)
    whole = run(base, tmp_path / "whole", recipe=plan, pools=pool)
    parts = resumed(partial(run, base, tmp_path / "parts", recipe=plan, pools=pool), 7)
    assert (parts.adapter, parts.losses, parts.maf) == (whole.adapter, whole.losses, whole.maf)
    assert run(base, tmp_path / "plain", recipe=recipe(max_steps=3), pools=pool).adapter != whole.adapter
    assert whole.pending == whole.visited == 6


def test_a_view_is_charged_when_it_is_made(base: ClipBase, tmp_path: Path) -> None:
    """Six steps of batch nine pass over six new rows three times, and over six reference rows six times."""

    def prepared(count: int, steps: int = 6, new: int = 6, reference: int = 6) -> float:
        pool = Pools(pairs("car", new), pairs("house", reference))
        plan = recipe(views={"count": count}, max_steps=steps)
        return run(base, tmp_path / f"{count}-{steps}", recipe=plan, pools=pool).cost["prepare_gflops"]

    one = prepared(1)
    assert [prepared(2), prepared(3)] == pytest.approx([2 * one, 3 * one], rel=0.1)
    assert prepared(3, steps=1, new=60, reference=0) < one, "no view is made that no step visits"
