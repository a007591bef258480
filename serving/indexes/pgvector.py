"""An index in PostgreSQL with pgvector: a nullable column ``ratchet_<space>`` of the user's table for each image space,
and a view that names the live one. NULL is pending: there is no cursor that a crash could lose. A trigger sets the
columns to NULL when the image changes. Rows that cannot be embedded are in ``ratchet_<table>_skipped``."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import numpy as np
import orjson
import psycopg
from psycopg import sql
from psycopg.errors import DependentObjectsStillExist, InvalidTableDefinition

from core.errors import ConfigError, StoreUnavailable
from core.ledger.rows import IndexRow
from serving.indexes.store import RETRY_SECONDS, Counts, PendingRow, Skip, Vector

CONNECTION: Final[dict[str, Any]] = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "application_name": "ratchet index",
}  # fmt: skip
LOCK: Final = sql.SQL("set local lock_timeout = '500ms'")
"""For changes of the table: others queue behind one that waits. The worker tries again."""
EF_SEARCH: Final = 100
"""``hnsw.ef_search`` with which recall is measured, and which the guide tells clients to set."""
IMAGE_TYPES: Final = ("text", "character varying", "bytea")
_HNSW: Final = "using hnsw ({column} vector_cosine_ops) with (m = 16, ef_construction = 128)"
_STILL: Final = """with given as (select g.id::{type} as id, g.version, g.value, g.transient from
  unnest(%(ids)s::text[], %(versions)s::text[], %(values)s::text[], %(transient)s::bool[])
  as g(id, version, value, transient)),
still as (select t.{id} as id, given.value, given.transient from {table} t join given on t.{id} = given.id
  and md5(t.{image}) = given.version for no key update of t skip locked) """
"""Rows whose images are the same, locked. Locked ones stay pending: waiting for them could end in a deadlock."""


class PgvectorStore:
    def __init__(self, index: IndexRow) -> None:
        self._url, self._name = index.url, index.name
        self._local = threading.local()
        self._connections: list[psycopg.Connection] = []
        *schema, table = index.source.split(".")
        named = sql.Literal(sql.Identifier(*schema, table).as_string(None))
        self._parts: dict[str, sql.Composable] = {"table": named}
        with self._cursor() as cursor:
            home = "select relnamespace::regnamespace::text from pg_class where oid = to_regclass({table})"
            fields = (
                "select attname, format_type(atttypid, null) from pg_attribute where attrelid = to_regclass({table})"
            )
            schema = [row[0] for row in self._run(cursor, home).fetchall()]
            types: dict[str, str] = dict(self._run(cursor, fields).fetchall())
        if index.id_field not in types or types.get(index.image_field, "") not in IMAGE_TYPES:
            raise ConfigError(
                f"{index.source} lacks the field {index.id_field!r}, or {index.image_field!r} of type text or bytea.",
                f"It has {', '.join(types) or 'no fields: is there such a table?'}.",
            )
        self._schema, self._prefix = schema, f"ratchet_{table}"
        self._parts = {
            "table": sql.Identifier(*schema, table), "id": sql.Identifier(index.id_field),
            "image": sql.Identifier(index.image_field), "view": sql.Identifier(*schema, index.name),
            "skipped": sql.Identifier(*schema, f"{self._prefix}_skipped"), "type": sql.SQL(types[index.id_field]),
            "function": sql.Identifier(*schema, f"{self._prefix}_changed"),
        }  # fmt: skip

    def open(self, space: str, dim: int) -> None:
        with self._change() as cursor:
            self._run(cursor, "create extension if not exists vector")
            self._run(cursor, f"alter table {{table}} add column if not exists {{column}} vector({dim})", space)
            self._run(
                cursor,
                "create table if not exists {skipped} (id {type} primary key, reason text, retry_at timestamptz)",
            )
            self._set_trigger(cursor)
        self._make_index(f"{space}_pending", "({id}) where {column} is null", space)

    def pending(self, space: str, limit: int, after: str | None = None) -> Sequence[PendingRow]:
        query = """select {id}::text, {image}, md5({image}) from {table} t where {column} is null
          and {image} is not null and (%(after)s::text is null or {id} > %(after)s::text::{type})
          and not exists (select from {skipped} s where s.id = t.{id} and (s.retry_at > now()) is not false)
          order by {id} limit %(limit)s"""
        with self._cursor() as cursor:
            rows = self._run(cursor, query, space, {"after": after, "limit": limit}).fetchall()
        return [PendingRow(*row) for row in rows]

    def write(self, space: str, rows: Sequence[tuple[PendingRow, Vector | Skip]]) -> int:
        good = [
            (row.id, row.version, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode(), False)
            for row, value in rows if not isinstance(value, Skip)
        ]  # fmt: skip
        bad = [(row.id, row.version, skip.reason, skip.transient) for row, skip in rows if isinstance(skip, Skip)]
        update = "update {table} t set {column} = still.value::vector from still where t.{id} = still.id"
        insert = """insert into {skipped} select id, value, case when transient then now() + {retry} end from still
          on conflict (id) do update set reason = excluded.reason, retry_at = excluded.retry_at"""
        written, retry = 0, sql.Literal(timedelta(seconds=RETRY_SECONDS))
        with self._cursor() as cursor, cursor.connection.transaction():
            for part, query in ((good, update), (bad, insert)):
                ids, versions, values, transient = map(list, zip(*part, strict=True)) if part else ([], [], [], [])
                given = {"ids": ids, "versions": versions, "values": values, "transient": transient}
                written += self._run(cursor, _STILL + query, space, given, retry=retry).rowcount
            done = [id for id, *_ in good]
            self._run(cursor, "delete from {skipped} where id = any(%(ids)s::text[]::{type}[])", None, {"ids": done})
        return written

    def counts(self, space: str) -> Counts:
        query = """select count({column}), count(*), count(s.id), count(s.retry_at)
          from {table} t left join {skipped} s on s.id = t.{id} and t.{column} is null where {image} is not null"""
        with self._cursor() as cursor:
            return Counts(*(self._run(cursor, query, space).fetchone() or ()))

    def build(self, space: str) -> None:
        with self._cursor() as cursor:
            self._run(cursor, "set maintenance_work_mem = '512MB'")
        self._make_index(space, _HNSW, space)

    def sample(self, space: str, count: int) -> Sequence[Vector]:
        query = "select {column}::text from {table} where {column} is not null order by random() limit %(count)s"
        with self._cursor() as cursor:
            rows = self._run(cursor, query, space, {"count": count}).fetchall()
        return [np.array(orjson.loads(text), np.float32) for (text,) in rows]

    def search(self, space: str, vector: Vector, count: int, exact: bool) -> Sequence[float]:
        query = """select 1 - ({column} <=> %(vector)s::vector) from {table} where {column} is not null
          order by {column} <=> %(vector)s::vector limit %(count)s"""
        scan = "set local enable_indexscan = off" if exact else f"set local hnsw.ef_search = {EF_SEARCH}"
        values = {"vector": str(vector.tolist()), "count": count}
        with self._cursor() as cursor, cursor.connection.transaction():
            self._run(cursor, scan)
            return [score for (score,) in self._run(cursor, query, space, values).fetchall()]

    def point(self, space: str) -> None:
        names = (
            "select attname from pg_attribute where attrelid = to_regclass({name}) and attnum > 0 and not attisdropped"
        )
        with self._change() as cursor:
            fields: list[str] = []
            for part in ("view", "table"):  # the fields that the view has already: it could not be replaced otherwise
                name = sql.Literal(self._parts[part].as_string(None))
                fields = fields or [
                    row[0] for row in self._run(cursor, names + " order by attnum", name=name).fetchall()
                ]
            own = [
                field for field in fields if field not in ("embedding", "space") and not field.startswith("ratchet_")
            ]
            listed = sql.SQL(", ").join(map(sql.Identifier, own))
            query = """create or replace view {view} as select {listed}, {column} as embedding, {literal}::text as space
              from {table} where {column} is not null"""
            given: dict[str, Any] = {"listed": listed, "literal": sql.Literal(space)}
            try:
                with cursor.connection.transaction():
                    self._run(cursor, query, space, **given)
            except InvalidTableDefinition:  # vectors of another dimension: grants have to be given again
                self._run(cursor, "drop view {view}")
                self._run(cursor, query, space, **given)

    def drop(self, space: str) -> None:
        drop = "alter table {table} drop column if exists {column}"
        with self._change() as cursor:
            try:
                with cursor.connection.transaction():
                    self._run(cursor, drop, space)
            except DependentObjectsStillExist:  # it is the one that the view names
                self._run(cursor, "drop view {view}")
                self._run(cursor, drop, space)
            self._set_trigger(cursor)

    def close(self) -> None:
        for connection in self._connections:
            with suppress(psycopg.Error):
                connection.close()

    def _set_trigger(self, cursor: psycopg.Cursor) -> None:
        """Make the trigger for the columns that there are; without any, remove what was added to the table."""
        query = r"""select attname from pg_attribute where attrelid = to_regclass({name}) and not attisdropped
          and attname like 'ratchet\_%'"""
        name = sql.Literal(self._parts["table"].as_string(None))
        columns = [row[0] for row in self._run(cursor, query, name=name).fetchall()]
        if not columns:
            self._run(cursor, "drop function if exists {function} cascade")
            self._run(cursor, "drop table if exists {skipped}")
            return
        clear = sql.SQL(" ").join(sql.SQL("new.{} := null;").format(sql.Identifier(each)) for each in columns)
        # Writers of the table need no rights on what is skipped: the function runs with those of its owner.
        self._run(cursor, """create or replace function {function}() returns trigger language plpgsql security definer
          set search_path = pg_catalog, pg_temp as $$ begin
          if tg_op = 'UPDATE' and new.{image} is not distinct from old.{image} then return new; end if;
          {clear} delete from {skipped} where id = new.{id}; return new; end $$""", clear=clear)  # fmt: skip
        self._run(cursor, """create or replace trigger ratchet_changed before insert or update of {image} on {table}
          for each row execute function {function}()""")  # fmt: skip

    def _make_index(self, suffix: str, definition: str, space: str) -> None:
        """Make an index without blocking writers; one that a killed process left unfinished is made again."""
        short = f"{self._prefix[: 63 - len(suffix) - 1]}_{suffix}"
        name, valid = (
            sql.Identifier(*self._schema, short),
            "select indisvalid from pg_index where indexrelid = to_regclass({at})",
        )
        with self._cursor() as cursor:
            row = self._run(cursor, valid, at=sql.Literal(name.as_string(None))).fetchone()
            if row == (False,):
                self._run(cursor, "drop index concurrently if exists {name}", name=name)
            if row != (True,):
                make = "create index concurrently if not exists {short} on {table} " + definition
                self._run(cursor, make, space, short=sql.Identifier(short))

    def _run(
        self, cursor: psycopg.Cursor, query: str, space: str | None = None, values: dict[str, Any] | None = None,
        **parts: Any,
    ) -> psycopg.Cursor:  # fmt: skip
        column = {} if space is None else {"column": sql.Identifier(f"ratchet_{space}")}
        return cursor.execute(sql.SQL(query).format(**self._parts, **column, **parts), values)

    @contextmanager
    def _change(self) -> Iterator[psycopg.Cursor]:
        with self._cursor() as cursor, cursor.connection.transaction():
            cursor.execute(LOCK)
            yield cursor

    @contextmanager
    def _cursor(self) -> Iterator[psycopg.Cursor]:
        """A cursor of this thread's own connection: making an index, which takes long, must not delay a flip."""
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None or connection.closed:
                connection = psycopg.connect(self._url, autocommit=True, **CONNECTION)
                self._local.connection = connection
                self._connections = [*(each for each in self._connections if not each.closed), connection]
            with connection.cursor() as cursor:
                yield cursor
        except psycopg.Error as error:
            words = str(error).strip().partition("\n")[0] or type(error).__name__
            raise StoreUnavailable(f"PostgreSQL of index {self._name}: {words}", "The worker tries again.") from None
