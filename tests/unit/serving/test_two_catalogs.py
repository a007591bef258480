from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from core.errors import StoreError
from serving.catalog.catalog import CLAIM_SECONDS, SpaceClaims
from serving.catalog.space_fill import CHUNK_ROWS
from serving.catalog.tables import Tables
from tests.support.waiting import until
from tests.unit.serving.catalog_world import ALL, HERE, THERE, World, vector

ROWS = 3 * CHUNK_ROWS


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
    catalog = World(tmp_path)
    catalog.put(100, ROWS)
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
    return pa.table({"id": list(ids), "domain": nothing, "source": nothing, "time": times, "text": nothing})


def test_a_row_that_is_there_is_not_merged_again_by_a_writer_that_does_not_know_it(tmp_path: Path) -> None:
    one, other = (Tables(str(tmp_path), tmp_path / "index") for _ in range(2))
    one.merge("aaaa", _data("a", "b"), np.stack([vector(0), vector(1)]))
    assert other.present("aaaa", ["a", "c"]) == {"a"}
    other.merge("aaaa", _data("b", "c"), np.stack([vector(5), vector(2)]))
    assert sorted(name for batch in one.id_batches("aaaa") for name in batch) == ["a", "b", "c"]
    assert one.search("aaaa", vector(1), 1, ALL)[0].id == "b"  # the first one stays


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


async def test_a_table_that_was_dropped_by_somebody_else_is_made_anew(tmp_path: Path) -> None:
    catalog = World(tmp_path)
    catalog.put(0, 4)
    await catalog.hold(HERE)
    Tables(catalog.tables.url, tmp_path / "elsewhere").drop("aaaa")
    with pytest.raises(StoreError, match="cannot be read"):
        for _ in range(3):
            await catalog.texts(0)
    await catalog.settle()
    assert len(await catalog.texts(0)) == 4


async def test_a_late_window_does_not_change_the_live_space(tmp_path: Path) -> None:
    catalog = World(tmp_path)
    await catalog.adopt([THERE, HERE])
    await catalog.adopt([HERE])
    assert catalog.searchable()[0] == THERE.image_space


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
