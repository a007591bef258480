"""The worker keeps a table's vectors in the space of what is live, whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from core.errors import LeaseLost, LedgerError
from core.ledger.indexes import INDEX_LEASE
from core.ledger.rows import IndexRow
from serving.indexes.store import IndexStore, open_store
from serving.indexes.worker import IndexKeeper
from tests.integration.indexes.world import World, drawn
from tests.support.postgres import PostgresServer


@pytest.fixture
def world(tmp_path: Path, pgvector: PostgresServer) -> Iterator[World]:
    made = World(tmp_path, pgvector.url)
    yield made
    made.close()


class Killed(BaseException):
    pass


class Mortal:
    """Passes calls on, and dies at one of them: before it, or after it."""

    def __init__(self, target: Any, plan: dict[str, int]) -> None:
        self._target, self._plan = target, plan

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name in ("reading", "close"):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self._plan["calls"] = number = self._plan.get("calls", 0) + 1
            if number == self._plan["dies"]:
                raise Killed
            answer = value(*arguments, **options)
            if number == -self._plan["dies"]:
                raise Killed
            return answer

        return call


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_index_is_filled_and_follows_a_release_and_a_rollback(world: World) -> None:
    world.put(*range(100))
    world.settle()
    assert world.is_right(None) and world.row(None).state == "live" and world.row(None).recall == 1.0
    proposal = world.propose("a")
    world.settle()
    assert world.is_right(None), "clients see the old space until the release"
    assert (world.row("a").state, world.row("a").rows, world.row("a").total) == ("ready", 100, 100)
    world.ledger.advance_proposal(proposal, "failed")
    world.release("a")
    assert world.keeper().flip()
    assert world.is_right("a") and world.row(None).state == "retained"
    world.put(7, 200, shift=1000)
    world.settle()
    assert world.is_right("a")
    world.release(None)
    assert world.keeper().flip()
    assert world.is_right(None), "with the rows that came meanwhile"


def test_a_space_outside_of_the_rollback_window_is_dropped(world: World) -> None:
    world.put(1, 2)
    world.settle()
    for letter in "ab":
        world.release(letter)
        world.settle()
    assert world.is_right("b")
    assert world.row(None).state == "dropped" and world.row("a").state == "retained"
    tables = {row[0] for row in world.user.execute("select tablename from pg_tables where schemaname = 'public'")}
    assert tables == {"photos"} | {f"ratchet_photos_{world.space(each)}" for each in "ab"}


def test_a_release_of_texts_changes_nothing(world: World) -> None:
    world.put(1)
    world.settle()
    world.release("c")
    world.settle()
    assert world.states == {world.space(None): "live"}


def test_a_worker_that_dies_at_any_call_loses_nothing(world: World) -> None:
    """At its first call, behind its second, at its third and so on, while rows change, and again after a release."""
    world.put(*range(20))
    for letter in (None, "a"):
        world.release(letter)
        for dies in range(1, 1000):
            plan = {"dies": dies if dies % 2 else -dies}

            def opener(row: IndexRow, plan: dict[str, int] = plan) -> IndexStore:
                return Mortal(open_store(row), plan)  # type: ignore[return-value]

            keeper = world.keeper(opener, Mortal(world.ledger, plan))
            with suppress(Killed):
                while keeper.fill() or keeper.flip():
                    pass
            keeper.close()
            if plan["calls"] < dies:
                break
            world.put(dies % 20, shift=1000 + dies)
        assert dies > 8
        assert world.is_right(letter)


def test_rows_that_change_or_come_while_an_index_is_filled_are_right(world: World) -> None:
    world.put(*range(300))
    thread, stopping = world.running()
    with_changes = iter(range(10_000))
    wait_until(lambda: world.put(next(with_changes) % 350, shift=5000) or "live" in world.states.values())
    world.release("b")
    wait_until(lambda: world.put(next(with_changes) % 350, shift=6000) or world.states.get(world.space("b")) == "live")
    pending = f'select count(*) from "ratchet_photos_{world.space("b")}" where embedding is null'
    wait_until(lambda: world.user.execute(pending).fetchone() == (0,))
    assert world.is_right("b")
    stopping.set()
    thread.join()


def test_pictures_that_cannot_be_read_are_told_and_do_not_block(world: World) -> None:
    world.put(1, 2)
    world.put(3, image=b"no picture")
    world.settle()
    assert world.is_right(None) and world.row(None).skipped == 1
    reasons = f'select reason from "ratchet_photos_{world.space(None)}" where reason is not null'
    ((reason,),) = world.user.execute(reasons).fetchall()
    assert "format" in reason
    world.put(3)
    world.settle()
    assert world.is_right(None) and set(world.found()[1]) == {1, 2, 3}


def test_a_database_that_is_away_is_told_and_comes_back(world: World, pgvector: PostgresServer) -> None:
    world.put(*range(5))
    thread, stopping = world.running()
    wait_until(lambda: "live" in world.states.values())
    pgvector.kill()
    try:
        wait_until(lambda: "PostgreSQL of index found" in world.ledger.index("found").problem)
    finally:
        pgvector.start()
    world.user.close()
    world.user = psycopg.connect(pgvector.url, autocommit=True)
    world.put(99)
    wait_until(lambda: not world.ledger.index("found").problem and 99 in world.found()[1])
    assert world.is_right(None)
    stopping.set()
    thread.join()


def test_a_second_worker_takes_over_and_the_first_can_write_no_more(world: World) -> None:
    world.put(1)
    first = world.ledger.acquire_lease(INDEX_LEASE, "one", 0)
    keeper = IndexKeeper(world.index, world.ledger, world.embedder, first)
    assert keeper.fill()
    assert world.ledger.acquire_lease(INDEX_LEASE, "two", 60) != first
    with pytest.raises(LeaseLost):
        keeper.fill()
    keeper.close()
    world.settle()
    assert world.is_right(None)


def test_a_paused_index_stays_as_it_is(world: World) -> None:
    world.put(1)
    world.settle()
    world.ledger.pause_index("found", True, actor="me")
    thread, stopping = world.running()
    world.release("a")
    assert world.ledger.unready_indexes(world.space("a")) == []
    assert world.ledger.index_problems() == {}
    world.ledger.pause_index("found", False, actor="me")
    assert world.ledger.unready_indexes(world.space("a")) == ["found (not begun)"]
    wait_until(lambda: world.states.get(world.space("a")) == "live")
    assert world.is_right("a")
    stopping.set()
    thread.join()


def test_each_change_of_the_state_is_an_event(world: World) -> None:
    world.put(1)
    world.settle()
    events = [row for row in world.ledger.events() if row.type == "ratchet.index.v1"]
    states = [row.data["state"] for row in reversed(events)]
    assert states == ["planned", "filling", "verified", "ready", "live"]
    assert events[0].subject == "indexes/found" and events[0].data["rows"] == 1


def test_grants_and_fields_of_the_view_stay(world: World) -> None:
    world.put(1)
    world.settle()
    world.user.execute("drop role if exists reader; create role reader; grant select on found to reader")
    world.user.execute("alter table photos add column later text")
    world.release("a")
    world.settle()
    fields = "select column_name from information_schema.columns where table_name = 'found' order by ordinal_position"
    assert [row[0] for row in world.user.execute(fields)] == ["id", "image", "title", "embedding", "space"]
    assert world.user.execute("select has_table_privilege('reader', 'found', 'select')").fetchone() == (True,)
    world.user.execute("drop owned by reader; drop role reader")


def test_a_worker_may_have_few_rights_and_writers_of_the_table_none(world: World) -> None:
    """Of the vectors: the trigger writes them."""
    world.user.execute(
        "drop role if exists worker; drop role if exists writer; create extension vector; "
        "create role worker login; grant create, usage on schema public to worker; "
        "grant select, trigger on photos to worker; create role writer; "
        "grant usage on schema public to writer; grant insert, update, delete, select on photos to writer"
    )
    url = world.index.url.replace("ratchet@", "worker@")
    row = IndexRow(name="found", url=url, source="photos", id_field="id", image_field="image")
    keeper = world.keeper(lambda _: open_store(row))
    world.put(1, 2)
    world.settle(keeper)
    world.user.execute("set role writer")
    world.put(2, 3, shift=50)
    world.user.execute("delete from photos where id = 1; update photos set id = 9 where id = 3; reset role")
    world.settle(keeper)
    assert set(world.found()[1]) == {2, 9} and world.is_right(None)
    keeper.close()
    world.user.execute("drop owned by worker, writer cascade; drop role worker; drop role writer")


def test_filling_a_space_writes_neither_the_table_nor_the_live_index(world: World) -> None:
    world.put(*range(50))
    world.settle()
    size = f"select pg_relation_size('ratchet_photos_{world.space(None)}_hnsw'), pg_relation_size('photos')"
    before = world.user.execute(size).fetchone()
    world.release("a")
    world.settle()
    assert world.user.execute(size).fetchone() == before
    assert world.is_right("a")


def test_tables_of_long_names_do_not_share_vectors(world: World) -> None:
    world.user.execute("drop schema if exists shop cascade; create schema shop")
    keepers = []
    for place, end in enumerate("ab"):
        table = "a_table_of_a_name_that_postgres_would_cut_behind_" + end
        world.user.execute(SQL("create table shop.{} (like photos including all)").format(Identifier(table)))
        row = IndexRow(
            name=f"found_{end}", url=world.index.url, source=f"shop.{table}", id_field="id", image_field="image"
        )
        world.ledger.add_index(row, actor="me")
        insert = SQL("insert into shop.{} values (%s, %s)").format(Identifier(table))
        world.user.execute(insert, (place, drawn(place)))
        keepers.append(IndexKeeper(row, world.ledger, world.embedder))
    for keeper in keepers:
        world.settle(keeper)
        keeper.close()
    for place, end in enumerate("ab"):
        assert world.user.execute(f"select id from shop.found_{end}").fetchall() == [(place,)]
    world.user.execute("drop schema shop cascade")


def test_a_name_or_table_is_taken_once(world: World) -> None:
    with pytest.raises(LedgerError, match="has photos already"):
        world.ledger.add_index(
            IndexRow(name="other", url=world.index.url, source="photos", id_field="id", image_field="image"), actor="me"
        )
