"""Changes to a ledger by sequential and concurrent processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

from alembic import command
from sqlalchemy import Connection, MetaData, insert, select

from core.ledger import Ledger, ReleaseRow
from core.ledger.database import alembic_config


def race(*calls: Callable[[], object]) -> list[Any]:
    """The result or exception of each call, all made at once, each in a thread."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait(30)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls, timeout=90))


def errors(results: list[Any]) -> list[str]:
    return sorted(type(each).__name__ for each in results if isinstance(each, Exception))


@contextmanager
def of_revision(url: str, revision: str, prepare: Callable[[Ledger], object] = lambda _: None) -> Iterator[Connection]:
    """Make the tables of a ledger again as an older revision has them, with the rows; closes it."""
    with closing(Ledger.open(url)) as opened:
        prepare(opened)
        with opened.database._writing.connect() as connection, connection.begin():
            remake(connection, revision)
            yield connection


def remake(connection: Connection, revision: str) -> None:
    """Tables of an older revision, with what it has columns for of the present rows."""
    new, old = MetaData(), MetaData()
    new.reflect(connection)
    rows = {table.name: connection.execute(select(table)).mappings().all() for table in new.sorted_tables}
    new.drop_all(connection)
    command.upgrade(alembic_config(connection), revision)
    old.reflect(connection)
    for table in old.sorted_tables:
        for row in () if table.name == "alembic_version" else rows[table.name]:
            connection.execute(insert(table).values({column.name: row[column.name] for column in table.columns}))


def begin(ledger: Ledger, update_id: str = "u1") -> None:
    ledger.begin_update(
        update_id, family="clip", recipe={"name": "default"}, seed=0, store_version=3, data_from={"t:0": 0},
        data_to={"t:0": 10}, incumbent=None,
    )  # fmt: skip


def release(
    ledger: Ledger, clip: str | None = None, vlm: str | None = None, share: float = 1.0, proposal: int | None = None,
    number: int | None = None,
) -> ReleaseRow:  # fmt: skip
    """The next release, by ``ann``."""
    live = ledger.live()
    number = number or (live.number if live else 0) + 1
    return ledger.commit_release(
        number, clip=clip, vlm=vlm, actor="ann", reason="because", proposal_id=proposal, share=share
    )
