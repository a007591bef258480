"""Queries of trust: sources that are not trusted, and the state of screening."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from core.errors import LedgerError
from core.ledger.database import Queries
from core.ledger.events import note
from core.ledger.rows import DistrustedSourceRow, Family, ScreeningRow


class TrustQueries(Queries):
    def distrust(self, source: str, *, actor: str, reason: str, update_id: str | None = None) -> DistrustedSourceRow:
        """Learn from a source no more, and judge with it no more. A second call keeps the first row."""
        with self.database.write() as session:
            known = session.get(DistrustedSourceRow, source)
            if known is not None:
                return known
            row = DistrustedSourceRow(source=source, actor=actor, reason=reason, update_id=update_id)
            session.add(row)
            note(session, actor, "distrust", f"source {source}"[:200], {"reason": reason, "update": update_id})
            session.flush()
            return row

    def trust(self, source: str, *, actor: str, reason: str) -> None:
        """Use a source's samples again. Raises LedgerError if it is trusted."""
        with self.database.write() as session:
            row = session.get(DistrustedSourceRow, source)
            if row is None:
                raise LedgerError(
                    f"the source {source!r} is trusted.", "`ratchet trust list` shows those that are not."
                )
            session.delete(row)
            note(session, actor, "trust", f"source {source}"[:200], {"reason": reason})

    def distrusted(self) -> list[DistrustedSourceRow]:
        return self._all(select(DistrustedSourceRow).order_by(DistrustedSourceRow.created_at))

    def screening(self, family: Family) -> ScreeningRow | None:
        return self._get(ScreeningRow, family)

    def screened(self, family: Family, offsets: dict[str, int], counts: dict[str, Any]) -> None:
        with self.database.write() as session:
            session.merge(ScreeningRow(family=family, offsets=offsets, counts=counts))
