from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from core.errors import StoreError
from serving.catalog.catalog import repeat
from serving.catalog.queries import Filters, as_filters
from serving.catalog.space_fill import CHUNK_ROWS
from serving.catalog.tables import Tables
from streams.store.rows import Position
from tests.support.disk import holds
from tests.support.waiting import until
from tests.unit.serving.catalog_world import ALL, HERE, THERE, World, rows, vector


@pytest.fixture
def catalog(tmp_path: Path) -> World:
    return World(tmp_path)


def covered(catalog: World) -> tuple[int, float]:
    status = catalog.status()
    return status["corpus_rows"], status["coverage"]


async def test_every_row_is_in_every_resident_space(catalog: World) -> None:
    catalog.put(0, CHUNK_ROWS + 5)
    await catalog.hold(THERE, HERE)
    for space in ("aaaa", "bbbb"):
        assert len(catalog.stored(space)) == CHUNK_ROWS + 4  # one image cannot be read
    assert catalog.status()["coverage"] == 1.0
    catalog.put(50, 1)
    await catalog.settle()
    assert set(catalog.encoder.calls[-2:]) == {(1, "clip-x"), (1, None)}  # only what is new; both spaces at once


async def test_cover_returns_when_the_space_is_complete(catalog: World) -> None:
    catalog.put(0, 10)
    running = asyncio.create_task(catalog.run())
    assert await asyncio.wait_for(catalog.cover(HERE), 20) == 10
    hits = await catalog.search("aaaa", vector(3), 1, ALL)
    assert (hits[0].text, round(hits[0].score, 4)) == ("text 3", 1.0)
    running.cancel()


async def test_retire_drops_what_no_release_needs(catalog: World) -> None:
    catalog.put(0, 4)
    await catalog.hold(THERE, HERE)
    assert await catalog.retire([THERE], spare={"aaaa"}) == [], "of a proposed release"
    assert await catalog.retire([THERE]) == ["aaaa"]
    assert catalog.tables.spaces() == ["bbbb"]
    with pytest.raises(StoreError, match="no index"):
        await catalog.texts(0)


async def test_a_space_that_was_retired_in_the_middle_of_a_batch_is_made_anew_when_it_comes_back(
    catalog: World,
) -> None:
    catalog.put(0, 6)
    await catalog.adopt([HERE])
    catalog.encoder.gate = asyncio.Event()
    stepping = asyncio.create_task(catalog.reconciler.step())
    await until(lambda: catalog.encoder.calls)
    await catalog.retire([])
    catalog.encoder.gate.set()
    await stepping
    await catalog.hold(HERE)
    assert len(catalog.stored()) == 6


@pytest.mark.parametrize("event", ["others are retired", "the table is made anew"])
async def test_a_space_that_a_release_waits_for_stays(catalog: World, event: str) -> None:
    catalog.put(0, 6)
    catalog.encoder.gate = asyncio.Event()
    running = asyncio.create_task(catalog.run())
    covering = asyncio.create_task(catalog.cover(THERE))
    await until(lambda: catalog.encoder.calls)
    if event == "others are retired":
        await catalog.retire([])  # was ordered before the release was proposed, and comes late
    else:
        catalog.reconciler.reopen("bbbb")
    catalog.encoder.gate.set()
    assert await asyncio.wait_for(covering, 20) == 6
    assert await catalog.retire([]) == ["bbbb"]
    running.cancel()


async def test_a_loop_that_is_woken_as_it_is_ended_ends() -> None:
    idle, woken = asyncio.Event(), asyncio.Event()

    async def step() -> bool:
        idle.set()
        return False

    running = asyncio.create_task(repeat(step, woken, 60))
    await idle.wait()
    await asyncio.sleep(0)  # it waits now
    woken.set()
    await asyncio.sleep(0)  # asyncio.wait_for would take the cancellation for the end of its wait
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(running), 20)


async def test_filters_are_conditions_and_not_code(catalog: World) -> None:
    catalog.put(0, 12)
    await catalog.hold(HERE)

    async def texts(filters: Filters) -> set[str]:
        return set(await catalog.texts(0, filters=filters))

    assert await texts(as_filters(domain=["even"])) == {f"text {n}" for n in range(0, 12, 2)}
    assert len(await texts(as_filters(source=["o'test"]))) == 12
    assert await texts(as_filters(source=["' OR 1=1 --"])) == set()
    since, until = datetime(2024, 1, 3, tzinfo=UTC), datetime(2024, 1, 5)
    assert await texts(as_filters(since=since, until=until)) == {"text 2", "text 3"}


def test_an_empty_space_finds_nothing_and_another_dimension_is_an_error(tmp_path: Path) -> None:
    tables = Tables(str(tmp_path / "c"), tmp_path / "index")
    assert tables.search("cccc", vector(0), 5, ALL) == []
    one = pa.table(
        {"id": ["a"], "domain": [""], "source": [""], "time": pa.array([None], pa.timestamp("us", "UTC")), "text": [""]}
    )
    tables.merge("cccc", one, vector(1)[None])
    with pytest.raises(StoreError, match="dimension"):
        tables.search("cccc", vector(0)[:4], 5, ALL)
    with pytest.raises(StoreError, match="not the name"):
        tables.search("../x", vector(0), 5, ALL)


async def test_a_deleted_sample_leaves_every_table_and_is_not_embedded_again(catalog: World) -> None:
    catalog.put(0, 6)
    await catalog.hold(THERE, HERE)
    assert catalog.delete("offset IN (1, 4)") == 2
    catalog.encoder.calls.clear()
    await catalog.settle()
    for space in ("aaaa", "bbbb"):
        assert set(catalog.stored(space)) == {row["id"] for row in rows(0, 6) if row["offset"] not in (1, 4)}
    assert catalog.encoder.calls == [] and covered(catalog) == (4, 1.0)
    assert set(await catalog.texts(4)) == {"text 0", "text 2", "text 3", "text 5"}


async def test_what_is_deleted_later_by_a_clock_that_is_behind_is_followed(
    catalog: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.put(0, 4)
    await catalog.hold(HERE)
    catalog.delete("offset = 0")
    await catalog.settle()

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(minutes=5)

    monkeypatch.setattr("streams.store.writer.datetime", Behind)
    catalog.delete("offset = 1")
    await catalog.settle()
    assert len(catalog.stored()) == 2


async def test_a_deleted_sample_that_is_sent_again_is_embedded_with_what_it_says_now(catalog: World) -> None:
    catalog.put(0, 3)
    await catalog.hold(HERE)
    catalog.delete("offset = 1")
    catalog.put(1, 1, offset=3, source="new")
    await catalog.settle()
    hits = await catalog.search("aaaa", vector(1), 1, ALL)
    assert (hits[0].id, hits[0].source) == (rows(1, 1)[0]["id"], "new")
    assert covered(catalog) == (3, 1.0)
    catalog.put(5, 1)
    catalog.delete("offset = 5")
    calls = len(catalog.encoder.calls)
    await catalog.settle()
    assert len(catalog.encoder.calls) == calls, "what was followed once is not followed again"


async def test_a_sample_that_was_deleted_before_it_was_embedded_and_sent_again_is_found(
    catalog: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.put(0, 2)
    await catalog.adopt([HERE])
    read = catalog.reconciler.embedder._read

    def deleted_meanwhile(samples: list[str]) -> Any:
        monkeypatch.setattr(catalog.reconciler.embedder, "_read", read)
        catalog.delete("offset = 1")
        return read(samples)

    monkeypatch.setattr(catalog.reconciler.embedder, "_read", deleted_meanwhile)
    await catalog.settle()
    assert len(catalog.stored()) == 1
    catalog.put(1, 1, offset=2)
    await catalog.settle()
    assert len(catalog.stored()) == 2 and covered(catalog)[1] == 1.0


async def test_what_was_deleted_while_nobody_followed_leaves_tables_that_nobody_holds_too(
    catalog: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.put(0, 60)
    catalog.put(60, 1, text="recognisable words")
    await catalog.hold(THERE, HERE)
    catalog.delete("offset = 60")
    second = World(tmp_path)
    await second.hold(HERE)
    for space in ("aaaa", "bbbb"):
        assert len(second.stored(space)) == 59, space  # one image cannot be read
    assert holds(tmp_path / "catalog", b"recognisable words")
    # It dies, too: the next one does not know what was removed, and still removes the bytes.
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    await World(tmp_path).hold(HERE)
    assert not holds(tmp_path / "catalog", b"recognisable words")
    assert holds(tmp_path / "catalog", b"text 59")


async def test_the_bytes_of_one_deleted_row_of_many_go_while_searches_and_appends_go_on(
    catalog: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.put(0, 60)
    catalog.put(60, 1, text="recognisable words")
    await catalog.hold(HERE)
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    catalog.delete("offset = 60")
    await catalog.settle()
    assert not holds(tmp_path / "catalog", b"recognisable words")
    assert len(await catalog.texts(3)) == 59
    catalog.put(61, 3)
    await catalog.settle()
    assert len(await catalog.texts(3)) == 62


async def test_bytes_go_in_two_passes_and_a_failing_one_is_tried_again(
    catalog: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, passes = [100.0], list[str]()
    monkeypatch.setattr("serving.catalog.reconcile.time.monotonic", lambda: now[0])
    catalog.put(0, 3)
    await catalog.hold(HERE)
    catalog.delete("offset = 1")
    failures = [StoreError("away", "")]

    def expunge(space: str, older_than: timedelta) -> None:
        if failures:
            raise failures.pop()
        passes.append(f"{space} at {now[0]:.0f}")

    monkeypatch.setattr(catalog.tables, "expunge", expunge)
    await catalog.settle()
    assert passes == []
    now[0] += 121
    with pytest.raises(StoreError, match="away"):
        await catalog.reconciler.step()
    catalog.put(3, 1)
    await catalog.settle()
    assert len(catalog.stored()) == 3, "what is new does not wait for it"
    for _ in range(4):
        now[0] += 121
        await catalog.settle()
    assert passes == ["aaaa at 342", "aaaa at 463"]


async def test_two_samples_with_one_id_are_one_until_they_are_settled(catalog: World) -> None:
    """Workers that share no index stored the same content at the same time."""
    [row] = rows(0, 1)
    catalog.corpus.put([row, {**row, "partition": 1}], [Position("t", 0, 1), Position("t", 1, 1)])
    await catalog.hold(HERE)
    assert covered(catalog) == (1, 1.0)
