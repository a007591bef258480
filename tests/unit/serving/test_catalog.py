"""A catalog: what is searched and deleted, a store that hangs, and its replica."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import lance
import pytest

from core.errors import StoreError, StoreUnavailable
from serving.catalog import catalog as catalogs
from serving.catalog import index_maintainer
from serving.catalog.catalog import Catalog, repeat
from serving.catalog.queries import Hit, Search, as_filters
from serving.catalog.row_columns import LABELS
from serving.releases.types import Residency
from serving.replicas.catalog import CatalogReplica
from streams.store.rows import Position
from tests.support.disk import holds
from tests.support.waiting import until
from tests.unit.serving.catalog_world import ALL, HERE, THERE, World, rows, vector


def covered(catalog: World) -> tuple[int, float]:
    status = catalog.status()
    return status["corpus_rows"], status["coverage"]


async def test_retire_drops_what_no_release_needs(catalog: World) -> None:
    catalog.put(0, 4)
    await catalog.hold(THERE, HERE)
    assert await catalog.retire([THERE], spare={"aaaa"}) == [], "of a proposed release"
    assert await catalog.retire([THERE]) == ["aaaa"]
    assert catalog.tables.spaces() == ["bbbb"]
    with pytest.raises(StoreError, match="no index"):
        await catalog.texts(0)


async def test_a_space_that_was_retired_during_a_batch_is_made_anew_when_it_comes_back(catalog: World) -> None:
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

    async def texts(**conditions: Any) -> set[str]:
        return set(await catalog.texts(0, filters=as_filters(**conditions)))

    assert await texts(domain=["even"]) == {f"text {n}" for n in range(0, 12, 2)}
    assert len(await texts(source=["o'test"])) == 12
    assert await texts(source=["' OR 1=1 --"]) == set()
    assert await texts(since=datetime(2024, 1, 3, tzinfo=UTC), until=datetime(2024, 1, 5)) == {"text 2", "text 3"}


async def test_labels_concepts_and_tags_are_filters(catalog: World) -> None:
    catalog.put(0, 2, label="кот", concept="o'cat", tags=["a b", "ü"])
    catalog.put(2, 2, label="dog", tags=["ü"])
    catalog.put(4, 2)
    await catalog.hold(HERE)

    async def texts(**conditions: Any) -> set[str]:
        return set(await catalog.texts(0, filters=as_filters(**conditions)))

    assert await texts(labels=["кот"]) == await texts(concepts=["o'cat"]) == await texts(tags=["a b"])
    assert await texts(labels=["кот", "dog"]) == await texts(tags=["x'", "ü"]) == {f"text {n}" for n in range(4)}
    assert await texts(labels=["dog"], domain=["even"]) == {"text 2"}
    assert await texts(tags=["a"]) == await texts(tags=["' OR 1=1 --"]) == set()


async def test_a_table_of_an_earlier_version_gets_its_labels_from_the_store_without_embedding_again(
    tmp_path: Path, catalog: World
) -> None:
    catalog.put(0, 6, label="cat", tags=["old"])
    catalog.put(6, 1)
    await catalog.hold(HERE)
    catalog.delete("offset = 5")
    address = f"{catalog.tables.url}/clip_aaaa.lance"
    lance.dataset(address).drop_columns(LABELS)
    old = lance.dataset(address).to_table()
    again = World(tmp_path)
    with pytest.raises(ValueError, match="label"):
        again.tables.search("aaaa", vector(0)[None], 9, as_filters(labels=["cat"]))
    await again.hold(HERE)
    assert again.encoder.calls == []
    assert set(await again.texts(0, filters=as_filters(labels=["cat"], tags=["old"]))) == {
        f"text {n}" for n in range(5)
    }
    assert await again.texts(6, 1, filters=as_filters(domain=["even"])) == ["text 6"]
    # A server of the earlier version adds a row.
    lance.dataset(address).delete(f"id = '{old['id'][0]}'")
    lance.dataset(address).merge_insert("id").when_not_matched_insert_all().execute(old.slice(0, 1))
    third = World(tmp_path)
    await third.hold(HERE)
    assert third.encoder.calls == [(1, None)], "it alone is embedded again"
    assert len(await third.texts(0, filters=as_filters(labels=["cat"]))) == 5


async def test_several_queries_find_what_each_finds_alone_and_samples_not_themselves(catalog: World) -> None:
    catalog.put(0, 40)
    await catalog.hold(HERE)
    ids = [row["id"] for row in rows(0, 4)]
    found = await catalog.search("aaaa", Search([vector(3), ids[3], vector(100)], 5, vectors=True))
    alone = [await catalog.hits(seed, 6) for seed in (3, 100)]
    texts = [[hit.text for hit in hits] for hits in found.hits]
    assert texts[0] == [hit.text for hit in alone[0][:5]] and texts[2] == [hit.text for hit in alone[1][:5]]
    assert texts[1] == [hit.text for hit in alone[0][1:]], "without itself"
    assert found.vectors.keys() == {hit.id for hits in found.hits for hit in hits}
    assert found.vectors[ids[3]] == pytest.approx(vector(3))
    missing = await catalog.search("aaaa", Search([ids[0], "f" * 64], 5))
    assert (missing.hits, missing.missing) == ([], ["f" * 64])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("k", [1, 7, 50])
async def test_pages_hold_each_hit_once_also_of_equal_vectors(
    catalog: World, monkeypatch: pytest.MonkeyPatch, k: int, indexed: bool
) -> None:
    monkeypatch.setattr(index_maintainer, "INDEX_ROWS", 1 if indexed else 10_000)
    catalog.put(0, 12)
    for start in range(100, 140, 4):  # four of each image
        catalog.put(start, 4, image=b"5")
    await catalog.hold(HERE)
    catalog.maintainer.settings = catalog.maintainer.settings.model_copy(update={"min_recall": 0.0})
    while await catalog.maintainer.step():
        pass
    assert (catalog.tables.indexes.usable("aaaa") is not None) == indexed
    own = rows(5, 1)[0]["id"]
    seen: list[list[str]] = [[], []]
    for offset in range(0, 52, k):
        found = await catalog.search("aaaa", Search([vector(5), own], k, offset=offset))
        assert await catalog.search("aaaa", Search([vector(5), own], k, offset=offset)) == found
        for ids, hits in zip(seen, found.hits, strict=True):
            ids.extend(hit.id for hit in hits)
    assert all(len(set(ids)) == len(ids) for ids in seen) and own not in seen[1]
    if not indexed:  # an index does not visit every row
        assert set(seen[0]) == {own, *seen[1]} and len(seen[0]) == 52


async def test_no_page_goes_beyond_the_depth(catalog: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogs, "MAX_DEPTH", 10)
    catalog.put(0, 12)
    await catalog.hold(HERE)
    pages = [(await catalog.search("aaaa", Search([vector(5)], 4, offset=at))).hits[0] for at in (0, 4, 8)]
    assert [len(page) for page in pages] == [4, 4, 2]


async def test_an_empty_space_finds_nothing_and_another_dimension_is_an_error(catalog: World) -> None:
    catalog.put(0, 1)
    await catalog.hold(HERE)
    assert catalog.tables.search("cccc", vector(0)[None], 5, ALL) == [[]]
    for space, query, told in (("aaaa", vector(0)[:4], "dimension"), ("../x", vector(0), "not the name")):
        with pytest.raises(StoreError, match=told):
            catalog.tables.search(space, query[None], 5, ALL)


async def test_a_deleted_sample_leaves_every_table_until_it_is_sent_again(catalog: World) -> None:
    catalog.put(0, 6)
    await catalog.hold(THERE, HERE)
    assert catalog.delete("offset IN (1, 4)") == 2
    catalog.encoder.calls.clear()
    await catalog.settle()
    for space in ("aaaa", "bbbb"):
        assert set(catalog.stored(space)) == {row["id"] for row in rows(0, 6) if row["offset"] not in (1, 4)}
    assert catalog.encoder.calls == [] and covered(catalog) == (4, 1.0)
    assert set(await catalog.texts(4)) == {"text 0", "text 2", "text 3", "text 5"}
    catalog.put(1, 1, offset=6, source="new")
    await catalog.settle()
    hits = await catalog.hits(1, 1)
    assert (hits[0].id, hits[0].source) == (rows(1, 1)[0]["id"], "new")
    assert covered(catalog) == (5, 1.0)
    catalog.put(7, 1)
    catalog.delete("offset = 7")
    calls = len(catalog.encoder.calls)
    await catalog.settle()
    assert len(catalog.encoder.calls) == calls, "what was followed once is not followed again"


async def test_what_a_clock_behind_deletes_is_followed(catalog: World, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_sample_deleted_before_it_was_embedded_returns(catalog: World, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_what_was_deleted_while_nobody_followed_leaves_tables_that_nobody_holds_too_and_its_bytes_go(
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
    third = World(tmp_path)
    await third.hold(HERE)
    assert not holds(tmp_path / "catalog", b"recognisable words")
    assert holds(tmp_path / "catalog", b"text 59")
    third.put(61, 3)
    await third.settle()
    assert len(await third.texts(3)) == 62, "searches and appends go on"


async def test_bytes_go_in_two_passes_and_failures_are_retried(catalog: World, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_late_window_does_not_change_the_live_space(catalog: World) -> None:
    await catalog.adopt([THERE, HERE])
    await catalog.adopt([HERE])
    assert catalog.searchable()[0] == THERE.image_space


HIT = Hit("id", 0.5, "", "", "", None)


@pytest.fixture
async def hung(catalog: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mock]:
    """Reads wait until the store ``answers`` again."""
    monkeypatch.setattr(catalogs, "READ_SECONDS", 0.3)
    monkeypatch.setattr(catalogs, "RETRY_SECONDS", 0.5)
    await catalog.adopt([HERE])
    answers = threading.Event()
    store = Mock(side_effect=lambda *_, **__: answers.wait(60) and [[HIT]], answers=answers)
    monkeypatch.setattr(catalog.tables, "search", store)
    yield store
    answers.set()


async def ask(catalog: World) -> list[Hit]:
    return await catalog.hits(0, 1, HERE.image_space)


async def refuse(catalog: World, times: int) -> None:
    for _ in range(times):
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await ask(catalog)
        time.sleep(0.1)


async def test_searches_of_a_hung_store_end(catalog: World, hung: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    await refuse(catalog, 10)  # more than there are threads
    assert time.monotonic() - began < 10 and hung.call_count < 5
    monkeypatch.setattr(catalog, "corpus", SimpleNamespace(scan=hung))
    with pytest.raises(StoreUnavailable):
        await catalog.image("f" * 64)
    hung.answers.set()
    end = time.monotonic() + 30
    while True:
        try:
            assert await ask(catalog) == [HIT]
            break
        except StoreUnavailable:
            assert time.monotonic() < end
            time.sleep(0.05)
    for _ in range(10):
        assert await ask(catalog) == [HIT]


async def test_an_index_needs_no_store(catalog: World, hung: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    await refuse(catalog, 10)
    monkeypatch.setattr(catalog.tables.indexes, "usable", lambda space: ("index", "effort"))
    monkeypatch.setattr(catalog.tables, "search_index", lambda *_: ([[HIT]], [HIT.id]))
    monkeypatch.setattr(catalog.tables, "with_texts", hung)
    for _ in range(10):
        assert await ask(catalog) == [HIT]


def replica(catalog: Catalog, read: AsyncMock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``read``: of the ledger, as a residency."""
    one: Any = object.__new__(CatalogReplica)
    one.catalog, one._adopting, one._adopted = catalog, asyncio.Lock(), 1
    one._residency_reader = SimpleNamespace(read=read)
    monkeypatch.setattr(one, "_adopt", catalog.adopt)
    monkeypatch.setattr(one, "_started", AsyncMock(return_value=catalog))
    return one


async def test_a_space_that_another_server_released_is_searched_at_once_and_while_the_ledger_is_away_is_not_here(
    tmp_path: Path, catalog: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = World(tmp_path)
    other.put(0, 6)
    await other.hold(THERE, HERE)
    await catalog.adopt([HERE])
    one = replica(catalog, AsyncMock(side_effect=TimeoutError), monkeypatch)
    assert "has no index here" in await one.search("bbbb", Search([vector(3)], 1))
    window = (THERE, HERE)
    one = replica(catalog, AsyncMock(return_value=Residency(window, window, ())), monkeypatch)
    found = await one.search(THERE.image_space, Search([vector(1003)], 1))
    assert [hit.text for hit in found.hits[0]] == ["text 3"]
