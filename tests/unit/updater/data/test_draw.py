from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from core.digests import digest_bytes
from core.errors import StoreError
from core.settings.updates import Draw
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.unit.updater.builders import recipe
from updater.data import pools
from updater.data.draw import decayed_counts, draw_key, draw_rows, reservoir_order
from updater.data.pools import Pools, draw_pools

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
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
    image = f"{partition}:{offset}".encode()
    return {
        "kind": "sample", "id": digest_bytes(image), "image": image, "text": f"text {partition} {offset}",
        "question": "", "answer": "", "label": "", "domain": "things", "concept": "common" if offset % 50 else "rare",
        "ingested_at": BEGIN + timedelta(hours=partition, seconds=offset), "split": "train", "look": None, "words": 0,
        "topic": "samples", "partition": partition, "offset": offset, **values,
    }  # fmt: skip


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


def test_words_and_images_are_read_for_the_rows_that_are_asked_for(
    store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Mock(side_effect=store.rows_at)
    monkeypatch.setattr(SampleStore, "rows_at", read)
    monkeypatch.setattr(pools, "WORDS_ROWS", 50)
    pool = drawn(store).new
    assert len(pool) == COUNT and not read.called
    some = pool[:60]
    words = some[47].text.split()
    assert [some[row].read() for row in (0, 47)][1] == f"{words[1]}:{words[2]}".encode()
    # In another order than that of the draw, a row costs no page.
    assert some[57].read() == some[57].read()
    counts = [(call.args[1][-1], len(call.args[0])) for call in read.call_args_list]
    assert counts == [("text", 50), ("text", 50), ("image", 48), ("image", 1), ("image", 1)]


def test_an_empty_store_has_nothing_pending_and_an_address_of_another_version_is_an_error(
    store: SampleStore, tmp_path: Path
) -> None:
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
