"""An index in PostgreSQL with pgvector: a table ``ratchet_<table>_<space>`` of vectors for each image space, which a
trigger of the user's table keeps in step with it, and a view that joins the live one. A row without a vector is
pending: there is no cursor that a crash could lose. The user's table is only read: vectors in columns of its own would
enter each HNSW index again whenever one of them is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
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
"""For changes of the table's trigger: others queue behind one that waits. The worker tries again."""
EF_SEARCH: Final = 200
"""``hnsw.ef_search`` with which recall is measured, and which the guide tells clients to set."""
IMAGE_TYPES: Final = ("text", "character varying", "bytea")
LONGEST: Final = 34
"""Characters of a table's name that still fit into 63 with ``ratchet_``, a space and ``_pending``."""
PAGE: Final = 5000
"""Rows that become pending at once when a space is opened; changes of their images wait meanwhile."""
_HNSW: Final = "using hnsw (embedding vector_cosine_ops) with (m = 16, ef_construction = 128)"
PENDING: Final = sql.SQL("embedding is null and version is not null and (reason is null or retry_at is not null)")


class PgvectorStore:
    def __init__(self, index: IndexRow) -> None:
        self._url, self._name = index.url, index.name
        self._local = threading.local()
        self._connections: list[psycopg.Connection] = []
        *schema, table = index.source.split(".")
        named = sql.Literal(sql.Identifier(*schema, table).as_string(None))
        self._parts: dict[str, sql.Composable] = {"table": named}
        with self._cursor() as cursor:
            home = """select nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where c.oid = to_regclass({table})"""
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
        self._schema, short = schema, table
        if len(table) > LONGEST:
            short = f"{table[: LONGEST - 9]}_{sha256(table.encode()).hexdigest()[:8]}"
        self._prefix = f"ratchet_{short}_"
        self._parts = {
            "table": sql.Identifier(*schema, table), "id": sql.Identifier(index.id_field),
            "image": sql.Identifier(index.image_field), "view": sql.Identifier(*schema, index.name),
            "type": sql.SQL(types[index.id_field]), "function": sql.Identifier(*schema, f"{self._prefix}changed"),
        }  # fmt: skip

    def open(self, space: str, dim: int) -> None:
        with self._change() as cursor:
            self._run(cursor, "create extension if not exists vector")
            self._run(cursor, f"""create table if not exists {{vectors}} (id {{type}} primary key, version text,
              embedding vector({dim}), reason text, retry_at timestamptz)""", space)  # fmt: skip
            self._set_trigger(cursor, self._spaces(cursor))
        query = """with page as (select {id} as id, md5({image}) as version from {table}
            where %(after)s::text is null or {id} > %(after)s::text::{type} order by {id} limit %(limit)s),
          added as (insert into {vectors} select * from page on conflict do nothing)
          select id::text from page order by id desc limit 1"""
        last: tuple[Any, ...] | None = (None,)
        with self._cursor() as cursor:
            while last is not None:
                last = self._run(cursor, query, space, {"after": last[0], "limit": PAGE}).fetchone()
        self._make_index(f"{space}_pending", "(id) where {pending}", space)

    def pending(self, space: str, limit: int, after: str | None = None) -> Sequence[PendingRow]:
        query = """select v.id::text, t.{image}, v.version from {vectors} v join {table} t on t.{id} = v.id
          where {pending} and (retry_at > now()) is not true
          and (%(after)s::text is null or v.id > %(after)s::text::{type}) order by v.id limit %(limit)s"""
        with self._cursor() as cursor:
            rows = self._run(cursor, query, space, {"after": after, "limit": limit}, pending=PENDING).fetchall()
        return [PendingRow(*row) for row in rows]

    def write(self, space: str, rows: Sequence[tuple[PendingRow, Vector | Skip]]) -> int:
        """Rows that others lock stay pending: waiting for them could end in a deadlock."""
        given = [
            (row.id, row.version, None, value.reason, value.transient) if isinstance(value, Skip)
            else (row.id, row.version, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode(), None, False)
            for row, value in rows
        ]  # fmt: skip
        query = """with given as (select * from unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bool[])
            as g(id, version, vector, reason, transient)),
          same as (select v.id, g.vector, g.reason, g.transient from {vectors} v
            join given g on v.id = g.id::{type} and v.version = g.version for update of v skip locked)
          update {vectors} v set embedding = same.vector::vector, reason = same.reason,
            retry_at = case when same.transient then now() + {retry} end from same where v.id = same.id"""
        retry = sql.Literal(timedelta(seconds=RETRY_SECONDS))
        with self._cursor() as cursor:
            columns = [list(column) for column in zip(*given, strict=True)]
            return self._run(cursor, query, space, columns, retry=retry).rowcount

    def counts(self, space: str) -> Counts:
        gone = "delete from {vectors} v where not exists (select from {table} t where t.{id} = v.id)"
        query = "select count(embedding), count(version), count(reason), count(retry_at) from {vectors}"
        with self._cursor() as cursor:
            self._run(cursor, gone, space)
            return Counts(*(self._run(cursor, query, space).fetchone() or ()))

    def build(self, space: str) -> None:
        with self._cursor() as cursor:
            self._run(cursor, "set maintenance_work_mem = '512MB'")
        self._make_index(f"{space}_hnsw", _HNSW, space)

    def sample(self, space: str, count: int) -> Sequence[Vector]:
        query = "select embedding::text from {vectors} where embedding is not null order by random() limit %(count)s"
        with self._cursor() as cursor:
            rows = self._run(cursor, query, space, {"count": count}).fetchall()
        return [np.array(orjson.loads(text), np.float32) for (text,) in rows]

    def search(self, space: str, vector: Vector, count: int, exact: bool) -> Sequence[float]:
        query = """select 1 - (embedding <=> %(vector)s::vector) from {vectors} where embedding is not null
          order by embedding <=> %(vector)s::vector limit %(count)s"""
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
            own = [field for field in fields if field not in ("embedding", "space")]
            listed = sql.SQL(", ").join(sql.Identifier("t", field) for field in own)
            query = """create or replace view {view} as select {listed}, v.embedding, {literal}::text as space
              from {vectors} v join {table} t on t.{id} = v.id where v.embedding is not null"""
            given: dict[str, Any] = {"listed": listed, "literal": sql.Literal(space)}
            try:
                with cursor.connection.transaction():
                    self._run(cursor, query, space, **given)
            except InvalidTableDefinition:  # vectors of another dimension: grants have to be given again
                self._run(cursor, "drop view {view}")
                self._run(cursor, query, space, **given)

    def drop(self, space: str) -> None:
        drop = "drop table if exists {vectors}"
        with self._change() as cursor:
            # The trigger first: that locks the user's table, so no writer still uses the one that is dropped.
            self._set_trigger(cursor, self._spaces(cursor) - {space})
            try:
                with cursor.connection.transaction():
                    self._run(cursor, drop, space)
            except DependentObjectsStillExist:  # it is the one that the view names
                self._run(cursor, "drop view {view}")
                self._run(cursor, drop, space)

    def close(self) -> None:
        for connection in self._connections:
            with suppress(psycopg.Error):
                connection.close()

    def _spaces(self, cursor: psycopg.Cursor) -> set[str]:
        query = """select substr(tablename, %(behind)s) from pg_tables where schemaname = %(schema)s
          and left(tablename, %(behind)s - 1) = %(prefix)s and substr(tablename, %(behind)s) ~ '^[0-9a-f]+$'"""
        values = {"schema": self._schema[0], "prefix": self._prefix, "behind": len(self._prefix) + 1}
        return {row[0] for row in self._run(cursor, query, None, values).fetchall()}

    def _set_trigger(self, cursor: psycopg.Cursor, spaces: set[str]) -> None:
        """Make the trigger for these spaces, or remove it if there are none."""
        if not spaces:
            self._run(cursor, "drop function if exists {function} cascade")
            return
        change = sql.SQL(" ").join(
            sql.SQL("""if tg_op <> 'INSERT' then delete from {vectors} where id = old.{id}; end if;
              if tg_op <> 'DELETE' then insert into {vectors} values (new.{id}, md5(new.{image})) on conflict (id)
                do update set version = excluded.version, embedding = null, reason = null, retry_at = null;
              end if;""").format(vectors=self._vectors(space), **self._parts)
            for space in sorted(spaces)
        )  # fmt: skip
        # Writers of the table need no rights on the vectors: the function runs with those of its owner.
        self._run(cursor, """create or replace function {function}() returns trigger language plpgsql security definer
          set search_path = pg_catalog, pg_temp as $$ begin
          if tg_op = 'UPDATE' and (new.{id}, new.{image}) is not distinct from (old.{id}, old.{image}) then
            return null; end if;
          {change} return null; end $$""", change=change)  # fmt: skip
        self._run(cursor, """create or replace trigger ratchet_changed after insert or delete or update of {id}, {image}
          on {table} for each row execute function {function}()""")  # fmt: skip

    def _make_index(self, suffix: str, definition: str, space: str) -> None:
        """Make an index without blocking writers; one that a killed process left unfinished is made again."""
        short = f"{self._prefix}{suffix}"
        name, valid = (
            sql.Identifier(*self._schema, short),
            "select indisvalid from pg_index where indexrelid = to_regclass({at})",
        )
        with self._cursor() as cursor:
            row = self._run(cursor, valid, at=sql.Literal(name.as_string(None))).fetchone()
            if row == (False,):
                self._run(cursor, "drop index concurrently if exists {name}", name=name)
            if row != (True,):
                make = "create index concurrently if not exists {short} on {vectors} " + definition
                self._run(cursor, make, space, short=sql.Identifier(short), pending=PENDING)

    def _run(
        self, cursor: psycopg.Cursor, query: str, space: str | None = None,
        values: dict[str, Any] | Sequence[Any] | None = None, **parts: Any,
    ) -> psycopg.Cursor:  # fmt: skip
        vectors = {} if space is None else {"vectors": self._vectors(space)}
        return cursor.execute(sql.SQL(query).format(**self._parts, **vectors, **parts), values)

    def _vectors(self, space: str) -> sql.Identifier:
        return sql.Identifier(*self._schema, f"{self._prefix}{space}")

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
