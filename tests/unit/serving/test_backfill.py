"""How the spaces of a catalog are filled and kept: by chunks, after kills and failures, and by several servers."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from core.errors import LedgerUnavailable, StoreError
from serving.catalog import catalog as catalog_module
from serving.catalog.catalog import CLAIM_SECONDS, SpaceClaims
from serving.catalog.cross_version import CrossVersionVerdicts, rank_across
from serving.catalog.queries import Hit, Search
from serving.catalog.space_fill import CHUNK_ROWS, Pace
from serving.catalog.tables import Tables
from tests.support.waiting import until
from tests.unit.serving.catalog_world import ALL, HERE, THERE, Encoder, World, vector

ROWS = 6 * CHUNK_ROWS


def world(folder: Path, encoder: Encoder | None = None) -> World:
    made = World(folder, encoder)
    made.put(100, ROWS)
    return made


async def test_every_row_is_in_every_resident_space_embedded_in_chunks_at_once_and_none_twice(catalog: World) -> None:
    catalog.put(0, ROWS + 5)
    for _ in range(10):
        catalog.reconciler.embedder.pace.ended(1, 0.1)
    encoder = catalog.encoder
    encoder.gate = asyncio.Event()
    await catalog.adopt([THERE, HERE])
    stepping = asyncio.create_task(catalog.reconciler.step())
    await until(lambda: len(encoder.calls) >= 3)
    encoder.gate.set()
    await stepping
    await catalog.settle()
    assert sum(count for count, _ in encoder.calls) == 2 * (ROWS + 4)  # one image cannot be read
    assert len(catalog.stored("aaaa")) == len(catalog.stored("bbbb")) == ROWS + 4
    assert catalog.status()["coverage"] == 1.0
    catalog.put(1000, 1)
    await catalog.settle()
    assert set(encoder.calls[-2:]) == {(1, "clip-x"), (1, None)}  # only what is new; both spaces at once


async def test_a_backfill_goes_on_after_a_kill(tmp_path: Path) -> None:
    catalog = world(tmp_path)
    await catalog.adopt([HERE])
    while catalog.searchable()[1] < CHUNK_ROWS:
        await catalog.reconciler.step()
        for fill in catalog.reconciler.fills.values():
            fill._finished_at = -1e9  # it is time to store
    done = len(catalog.stored())
    assert 0 < done < ROWS
    second = World(tmp_path)
    await second.hold(HERE)
    assert sum(count for count, _ in second.encoder.calls) == ROWS - done
    assert len(second.stored()) == ROWS


async def test_what_was_embedded_stays_when_another_chunk_fails(tmp_path: Path) -> None:
    catalog = world(tmp_path, Encoder(2))
    await catalog.adopt([HERE])
    with pytest.raises(StoreError, match="died"):
        await catalog.settle()
    assert catalog.status()["trouble"].startswith("the replica died")
    await catalog.settle()
    assert sum(count for count, _ in catalog.encoder.calls) == ROWS
    assert (catalog.status()["coverage"], catalog.status()["trouble"]) == (1.0, "")


async def test_a_release_fails_when_its_backfill_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = world(tmp_path, Encoder(0))
    await catalog.adopt([THERE])
    with pytest.raises(StoreError):
        await catalog.reconciler.step()
    monkeypatch.setattr(catalog_module, "STALL_SECONDS", 0.0)
    monkeypatch.setattr(catalog_module, "LOOK_SECONDS", 0.01)
    with pytest.raises(StoreError, match=r"stands still at 0.0%: the replica died"):
        await catalog.cover(THERE)


async def test_a_space_whose_verdict_allows_it_is_searched_before_it_is_complete(tmp_path: Path) -> None:
    catalog = world(tmp_path)
    await catalog.hold(HERE)
    catalog.cross_version["bbbb"] = "aaaa"
    catalog.encoder.gate = asyncio.Event()
    running = asyncio.create_task(catalog.run())
    await catalog.cover(THERE, most_seconds=0.01)
    assert await catalog.texts(123, 1, "bbbb") == ["text 123"], "found by its old vector"
    found = await catalog.search("bbbb", Search([vector(123), vector(130)], 1, vectors=True))
    assert [hits[0].text for hits in found.hits] == ["text 123", "text 130"]
    assert found.vectors == {}, "none of the new space is there yet"
    sample = found.hits[1][0].id
    assert (await catalog.search("bbbb", Search([sample], 1))).missing == [sample]
    catalog.encoder.gate.set()
    await catalog.cover(THERE)
    assert await catalog.texts(1123, 1, "bbbb") == ["text 123"], "and by its new one when that is there"
    running.cancel()


def test_scores_of_old_vectors_are_shifted_to_those_of_new_ones() -> None:
    by_old = [Hit(name, 0.9 - 0.1 * number, "", "", "", None) for number, name in enumerate("abcde")]
    ranked = rank_across(by_old, {"a": 0.95, "c": 0.9, "e": 0.65})
    assert [hit.id for hit in ranked] == ["a", "b", "c", "d", "e"]
    assert ranked[1].score == pytest.approx(0.8 + (0.05 + 0.2 + 0.15) / 3)
    assert [hit.score for hit in rank_across(by_old[:2], {"a": 0.99})] == [0.99, 0.8]


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ({"allowed": True, "incumbent": None}, {"bbbb": "aaaa"}), ({"allowed": True, "incumbent": "clip-gone"}, {}),
        ({"allowed": False, "incumbent": None}, {}), ({}, {}), (LedgerUnavailable("away", ""), {}),
    ],
    ids=["allowed", "the incumbent is gone", "not allowed", "no verdict", "the ledger is away"],
)  # fmt: skip
async def test_a_space_is_searched_by_the_incumbents_where_allowed(measured: Any, found: dict[str, str]) -> None:
    ledger = Mock(cross_version=Mock(side_effect=[measured or None]))
    verdicts = CrossVersionVerdicts(ledger)
    verdicts.remember([HERE])
    assert await verdicts.read([THERE], {"aaaa"}) == found


def _fill(folder: Path, barrier: Barrier) -> None:

    async def run() -> None:
        catalog = World(folder)
        await catalog.adopt([THERE, HERE])
        barrier.wait()
        await catalog.settle()

    asyncio.run(run())


def test_catalogs_of_two_processes_add_each_row_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=_fill, args=(tmp_path, barrier))
    catalog = world(tmp_path)
    other.start()
    _fill(tmp_path, barrier)
    other.join()
    assert other.exitcode == 0
    for space in ("aaaa", "bbbb"):
        stored = catalog.stored(space)
        assert len(stored) == len(set(stored)) == ROWS


def _data(*ids: str) -> pa.Table:
    nothing = pa.nulls(len(ids), pa.string())
    times = pa.nulls(len(ids), pa.timestamp("us", tz="UTC"))
    tags = pa.nulls(len(ids), pa.list_(pa.string()))
    texts = dict.fromkeys(("domain", "source", "text", "concept", "label"), nothing)
    return pa.table({"id": list(ids), "time": times, "tags": tags, **texts})


def test_a_row_that_is_there_is_not_merged_again_by_a_writer_that_does_not_know_it(tmp_path: Path) -> None:
    one, other = (Tables(str(tmp_path), tmp_path / "index") for _ in range(2))
    one.merge("aaaa", _data("a", "b"), np.stack([vector(0), vector(1)]))
    assert other.present("aaaa", ["a", "c"]) == {"a"}
    other.merge("aaaa", _data("b", "c"), np.stack([vector(5), vector(2)]))
    assert sorted(name for batch in one.id_batches("aaaa") for name in batch) == ["a", "b", "c"]
    assert one.search("aaaa", vector(1)[None], 1, ALL)[0][0].id == "b"  # the first one stays


def test_a_table_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    made, place = tmp_path / "elsewhere", tmp_path / "lake"
    Tables(str(made), tmp_path / "index").merge("aaaa", _data("a", "b"), np.stack([vector(0), vector(1)]))
    (place / "clip_aaaa.lance").mkdir(parents=True)  # its folder is there before its first version

    def make() -> None:
        versions = shutil.ignore_patterns("_versions")
        shutil.copytree(made / "clip_aaaa.lance", place / "clip_aaaa.lance", dirs_exist_ok=True, ignore=versions)
        (made / "clip_aaaa.lance" / "_versions").rename(place / "clip_aaaa.lance" / "_versions")

    timer = threading.Timer(0.3, make)
    timer.start()
    assert Tables(str(place), tmp_path / "index").present("aaaa", ["a", "c"]) == {"a"}
    timer.join()


async def test_a_table_that_another_server_holds_resident_is_not_dropped(tmp_path: Path) -> None:
    ours, theirs = World(tmp_path), World(tmp_path)
    ours.put(0, 4)
    running = asyncio.create_task(theirs.run())
    await theirs.adopt([THERE, HERE])
    await ours.hold(THERE, HERE)
    await until(lambda: ours.claims.claimed_by_others(["aaaa", "bbbb"]) == {"aaaa", "bbbb"})
    assert await ours.retire([THERE]) == []
    assert len(await theirs.texts(0)) == 4
    assert await theirs.retire([THERE], spare=None) == []
    theirs.claims.renew(["bbbb"])
    assert await ours.retire([THERE]) == ["aaaa"]
    running.cancel()


async def test_a_table_that_was_dropped_by_somebody_else_is_made_anew(catalog: World, tmp_path: Path) -> None:
    catalog.put(0, 4)
    await catalog.hold(HERE)
    Tables(catalog.tables.url, tmp_path / "elsewhere").drop("aaaa")
    with pytest.raises(StoreError, match="cannot be read"):
        for _ in range(3):
            await catalog.texts(0)
    await catalog.settle()
    assert len(await catalog.texts(0)) == 4


def test_a_claim_that_is_not_renewed_is_over_and_removed(tmp_path: Path) -> None:
    now = [0.0]
    ours, theirs = (SpaceClaims(str(tmp_path), holder * 8, lambda: now[0]) for holder in "01")
    theirs.renew(["aaaa"])
    assert ours.claimed_by_others(["aaaa", "bbbb"]) == {"aaaa"}
    now[0] = CLAIM_SECONDS
    theirs.renew(["aaaa"])
    assert ours.claimed_by_others(["aaaa"]) == {"aaaa"}
    path = tmp_path / "claims" / f"{'1' * 8}.json"
    whole = path.read_bytes()
    path.write_text('{"spa')  # it may name anything
    assert ours.claimed_by_others(["bbbb"]) == {"bbbb"}
    path.write_bytes(whole)
    assert ours.claimed_by_others(["aaaa"]) == {"aaaa"}
    now[0] = 2 * CLAIM_SECONDS + 1
    assert ours.claimed_by_others(["aaaa"]) == set()
    assert list((tmp_path / "claims").iterdir()) == []


def test_the_pace_follows_the_replicas_and_gives_way_to_requests() -> None:
    pace = Pace(8)
    assert pace.width == 1
    for _ in range(20):
        pace.ended(32, 0.4)
    assert 4 <= pace.width <= 8, "as fast as before: more at once"
    pace.ended(32, 4.0)
    pace.ended(32, 4.0)
    assert pace.width <= 2, "requests came first"
    for _ in range(100):
        pace.ended(32, 0.4)
    assert pace.width == 8
