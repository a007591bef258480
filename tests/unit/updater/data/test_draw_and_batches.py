from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import StoreError
from core.settings.updates import Draw
from serving.engines.clip_base import ClipBase
from serving.engines.preprocess import Preprocess
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import sample
from tests.unit.updater.builders import pairs, picture, png, pools, recipe, resumed, run
from updater.data.draw import decayed_counts, draw_key, draw_rows, reservoir_order
from updater.data.mixture import PARTS, BatchPlan, plan_batches
from updater.data.pools import Pair, Pools, draw_pools, grouped, run_starts, visits
from updater.families.clip_learner import ClipLearner, phrased, view_pixels
from updater.recipes import Batches, Mixture, Part, Views

COUNT = 400


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    """Two partitions of 200 train samples each; those of partition 1 came an hour later. Other rows are not drawn."""
    store = SampleStore(str(tmp_path_factory.mktemp("lake")))
    for partition in (1, 0):
        rows = [_row(partition, offset) for offset in range(COUNT // 2)]
        rows.append(_row(partition, 200, split="fresh_eval"))
        rows.append(_row(partition, 201, text="", question="what?", answer="this"))
        store.put(rows, [Position("samples", partition, 202)])
    return store


def _row(partition: int, offset: int, **values: Any) -> dict[str, Any]:
    own = {"text": f"text {partition} {offset}", "concept": "common" if offset % 50 else "rare", **values}
    time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=partition, seconds=offset)
    return sample(partition, offset, image=f"{partition}:{offset}".encode(), ingested_at=time, **own)


def drawn(store: SampleStore, draw: Draw = "uniform", seed: int = 1, **data_from: int) -> Pools:
    offsets = {f"samples:{name[1:]}": offset for name, offset in data_from.items()}
    return draw_pools(store, recipe(replay_limit=60), (), store.version(), offsets, seed, draw)


def texts(examples: Any) -> list[str]:
    return [example.text for example in examples]


def test_a_uniform_draw_is_of_all_that_is_pending_in_an_order_of_its_seed(store: SampleStore) -> None:
    everything = {f"text {partition} {offset}" for partition in (0, 1) for offset in range(200)}
    order = texts(drawn(store).new)
    assert len(order) == COUNT and set(order) == everything
    assert order == texts(drawn(store).new) != texts(drawn(store, seed=2).new)
    for seed in range(3):  # 40 of 400 by chance: 20 of each partition and each half, within four standard deviations
        first = texts(drawn(store, seed=seed).new[:40])
        assert 8 <= sum(text.startswith("text 1") for text in first) <= 32
        assert 8 <= sum(int(text.split()[-1]) < 100 for text in first) <= 32


def test_the_newest_come_first_where_that_is_set(store: SampleStore) -> None:
    order = texts(drawn(store, "newest").new)
    late = [f"text 1 {offset}" for offset in reversed(range(200))]
    assert order == late + [text.replace("text 1", "text 0") for text in late]


def test_replay_is_drawn_from_all_that_is_earlier_where_the_recipe_replays(store: SampleStore) -> None:
    """Whether or not an update visited it."""
    pool = drawn(store, p0=150, p1=200)
    assert set(texts(pool.new)) == {f"text 0 {offset}" for offset in range(150, 200)}
    replay = texts(pool.replay)
    earlier = {f"text 0 {offset}" for offset in range(150)} | {f"text 1 {offset}" for offset in range(200)}
    assert len(replay) == len(set(replay)) == 60 and set(replay) <= earlier
    rare = {text for text in earlier if int(text.split()[-1]) % 50 == 0}
    assert len(rare) == 7 and rare <= set(replay)  # balanced over concepts
    without = recipe(mixture={"reference": 0.5, "new": 0.5, "replay": 0})
    found = draw_rows(store, without, store.version(), {"samples:0": 100, "samples:1": 0}, 1, "uniform")
    assert (len(found.new), len(found.replay)) == (300, 0)


def test_only_rows_that_are_asked_for_are_read(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(side_effect=store.rows_at)
    monkeypatch.setattr(SampleStore, "rows_at", read)
    monkeypatch.setattr("updater.data.pools.WORDS_ROWS", 50)
    pool = drawn(store).new
    assert len(pool) == COUNT and not read.called
    some = pool[:60]
    words = some[47].text.split()
    assert [some[row].read() for row in (0, 47)][1] == f"{words[1]}:{words[2]}".encode()
    # In another order than that of the draw, a row costs no page.
    assert some[57].read() == some[57].read()
    counts = [(call.args[1][-1], len(call.args[0])) for call in read.call_args_list]
    assert counts == [("text", 50), ("text", 50), ("image", 48), ("image", 1), ("image", 1)]


def test_an_empty_store_has_nothing_and_an_unknown_address_is_an_error(store: SampleStore, tmp_path: Path) -> None:
    pool = draw_pools(SampleStore(str(tmp_path)), recipe(), (), 0, {}, seed=1)
    assert (len(pool.new), len(pool.replay)) == (0, 0)
    with pytest.raises(IndexError):
        pool.new[0]
    with pytest.raises(StoreError, match="lacks 1 rows"):
        store.rows_at([999 << 32], ["id"], store.version())


def test_what_lies_after_the_end_of_the_data_is_neither_new_nor_replayed(store: SampleStore) -> None:
    def until(data_from: dict[str, int], data_to: dict[str, int]) -> Pools:
        return draw_pools(store, recipe(replay_limit=60), (), store.version(), data_from, 1, "uniform", data_to)

    anew = until({}, {"samples:0": 30})
    assert set(texts(anew.new)) == {f"text 0 {offset}" for offset in range(30)} and not anew.replay
    both = until({"samples:0": 10, "samples:1": 5}, {"samples:0": 30, "samples:1": 5})
    assert set(texts(both.new)) == {f"text 0 {offset}" for offset in range(10, 30)}
    early = {f"text 0 {offset}" for offset in range(10)} | {f"text 1 {offset}" for offset in range(5)}
    assert set(texts(both.replay)) == early


def rows(**counts: int) -> list[str]:
    return [f"{concept}-{i}" for concept, count in counts.items() for i in range(count)]


def reservoir(ids: list[str], capacity: int, half_life: float, seed: int, balanced: bool = True) -> list[str]:
    keys = np.fromiter((draw_key(name, seed) for name in ids), np.uint64, len(ids))
    order = reservoir_order(keys, [name.split("-")[0] for name in ids], capacity, half_life, balanced)
    return [ids[number] for number in order]


def test_as_many_are_kept_as_fit_and_a_part_of_the_draw_is_a_smaller_draw() -> None:
    """So an update that visits fewer rows visits a reservoir of fewer."""
    few, many = rows(cat=3, dog=4), rows(cat=300, dog=40)
    for capacity, kept in ((0, 0), (1, 1), (7, 7), (9, 7)):
        found = reservoir(few, capacity, 100, seed=0)
        assert len(set(found)) == len(found) == kept and set(found) <= set(few)
    assert reservoir(many, 100, 50, seed=0)[:30] == reservoir(many, 30, 50, seed=0) != reservoir(many, 30, 50, seed=1)


def test_a_rare_concept_is_not_drowned_by_a_common_one_and_most_stays_when_the_stream_grows() -> None:
    """900 cats and 100 dogs into 100 places: drawn evenly over rows that would be 10 dogs; balanced it is about 50."""
    kept = reservoir(rows(cat=900, dog=100), 100, half_life=1e9, seed=0)
    assert len(kept) == len(set(kept)) == 100
    assert 35 <= sum(name.startswith("dog") for name in kept) <= 60
    more = reservoir(rows(cat=900, dog=100) + [f"cat-new-{i}" for i in range(20)], 100, 1e9, seed=0)
    assert len(set(kept) & set(more)) > 80


def test_an_unbalanced_draw_is_uniform_over_rows() -> None:
    """Whatever its concept, each of 100 rows is among the 20 drawn one time in five."""
    many, seeds = rows(cat=90, dog=10), 400
    drawn = Counter(name for seed in range(seeds) for name in reservoir(many, 20, 50, seed, balanced=False))
    variance = seeds * 0.2 * 0.8
    # Chi-square over 99 degrees of freedom, within five standard deviations of its mean on either side.
    chi_square = sum((drawn[name] - seeds * 0.2) ** 2 / variance for name in many) * 0.99
    assert abs(chi_square - 99) < 5 * (2 * 99) ** 0.5


def test_counts_are_halved_after_a_half_life() -> None:
    counts = decayed_counts(["a"] * 10 + ["b"] * 10, half_life=10)
    newest = sum(0.5 ** (i / 10) for i in range(10))
    assert (counts["a"], counts["b"]) == pytest.approx((newest / 2, newest))


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
def test_every_batch_has_its_size_and_shares_and_rows_are_seen_equally_often(
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
