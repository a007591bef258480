"""Queries of indexes outside, and of the state of each image space in them."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import delete, select

from core.errors import LedgerError
from core.ledger.database import Queries
from core.ledger.events import add_event, note
from core.ledger.leases import check_lease, is_held
from core.ledger.rows import IndexRow, IndexSpaceRow, IndexState

INDEX_LEASE: Final = "indexes"
SEARCHABLE: Final[tuple[IndexState, ...]] = ("ready", "live", "retained")


class IndexQueries(Queries):
    def add_index(self, row: IndexRow, *, actor: str) -> None:
        """Raises LedgerError if the name, or the table, is taken."""
        with self.database.write() as session:
            same = (IndexRow.url == row.url) & (IndexRow.source == row.source)
            if taken := session.scalars(select(IndexRow).where((IndexRow.name == row.name) | same)).first():
                raise LedgerError(f"index {taken.name!r} has {taken.source} already.", "See `ratchet index list`.")
            session.add(row)
            note(session, actor, "add index", f"index {row.name}", {"url": row.url, "source": row.source})

    def index(self, name: str) -> IndexRow:
        """Raises LedgerError if there is none of this name."""
        if (row := self._get(IndexRow, name)) is None:
            raise LedgerError(f"there is no index {name!r}.", "See `ratchet index list`.")
        return row

    def indexes(self) -> list[IndexRow]:
        return self._all(select(IndexRow).order_by(IndexRow.name))

    def index_spaces(self, name: str | None = None) -> list[IndexSpaceRow]:
        query = select(IndexSpaceRow).order_by(IndexSpaceRow.name, IndexSpaceRow.updated_at)
        return self._all(query if name is None else query.where(IndexSpaceRow.name == name))

    def pause_index(self, name: str, paused: bool, *, actor: str) -> None:
        """Leave an index as it is, or go on. Releases do not wait for a paused one."""
        self.index(name)
        with self.database.write() as session:
            session.get_one(IndexRow, name).paused = paused
            note(session, actor, "pause index" if paused else "resume index", f"index {name}", {})

    def remove_index(self, name: str, *, actor: str) -> None:
        with self.database.write() as session:
            session.execute(delete(IndexSpaceRow).where(IndexSpaceRow.name == name))
            session.execute(delete(IndexRow).where(IndexRow.name == name))
            note(session, actor, "remove index", f"index {name}", {})

    def set_index_problem(self, name: str, problem: str) -> None:
        with self.database.write() as session:
            if (row := session.get(IndexRow, name)) is not None:
                row.problem = problem

    def set_index_space(self, name: str, space: str, *, epoch: int | None, **values: Any) -> None:
        """Change a space's row, or add it. A space that becomes live retains the one that was. A change of the state
        adds an event. Raises LeaseLost if another worker took over; LedgerError if the index was removed."""
        with self.database.write() as session:
            if epoch is not None:
                check_lease(session, INDEX_LEASE, epoch)
            if session.get(IndexRow, name) is None:
                raise LedgerError(f"index {name!r} was removed.", "Nothing needs to be done.")
            changed: list[IndexSpaceRow] = []
            if values.get("state") == "live":
                live = select(IndexSpaceRow).where(IndexSpaceRow.name == name, IndexSpaceRow.state == "live")
                changed = list(session.scalars(live.where(IndexSpaceRow.space != space)))
                for other in changed:
                    other.state = "retained"
            row = session.get(IndexSpaceRow, (name, space))
            before = None if row is None else row.state
            if row is None:
                session.add(row := IndexSpaceRow(name=name, space=space))
            for key, value in values.items():
                setattr(row, key, value)
            session.flush()
            for each in [*changed, row] if row.state != before else changed:
                fields = ("name", "space", "state", "rows", "total", "skipped", "recall")
                data = {field: getattr(each, field) for field in fields}
                fact = f"index-{name}-{each.space}-{each.state}-{each.updated_at.timestamp()}"
                add_event(session, "ratchet.index.v1", fact, f"indexes/{name}", data)

    def index_problems(self) -> dict[str, str]:
        """For each index that is not paused why it is not kept up to date, or an empty text."""
        with self.database.read() as session:
            works = is_held(session, INDEX_LEASE)
            rows = session.scalars(select(IndexRow).where(~IndexRow.paused))
            return {row.name: row.problem if works else "no worker runs" for row in rows}

    def unready_indexes(self, space: str) -> list[str]:
        """Indexes, not paused, that do not have all rows of an image space, each with its progress."""
        with self.database.reading():
            rows = {row.name: row for row in self.index_spaces() if row.space == space}
            waiting = [row for row in self.indexes() if not row.paused]
        texts = []
        for index in waiting:
            row = rows.get(index.name)
            if row is None or row.state not in SEARCHABLE:
                progress = "not begun" if row is None else f"{row.state}, {row.rows:,} of {row.total:,} rows"
                texts.append(f"{index.name} ({index.problem or progress})")
        return texts
