"""Queries of release audits: the live adapter on the items that no candidate was judged on."""

from __future__ import annotations

from sqlalchemy import select

from core.ledger.events import note
from core.ledger.releases import ReleaseQueries, add_hold, open_hold
from core.ledger.rows import Family, ReleaseAuditRow

RELEASES = 1000


class ReleaseAuditQueries(ReleaseQueries):
    def record_release_audit(self, row: ReleaseAuditRow) -> ReleaseAuditRow:
        """Record an audit; a release of a family has one, and a second call returns the first. One that failed puts
        updates on hold in the same transaction."""
        same = select(ReleaseAuditRow).where(
            ReleaseAuditRow.family == row.family, ReleaseAuditRow.release == row.release
        )
        with self.database.write() as session:
            known = session.scalars(same).first()
            if known is not None:
                return known
            session.add(row)
            reasons = row.summary["reasons"]
            detail = {"family": row.family, "adapter": row.adapter, "passed": row.passed, "reasons": reasons}
            note(session, "updater", "audit release", f"release {row.release}", detail)
            if not row.passed and open_hold(session) is None:
                add_hold(session, "updater", f"the audit of release {row.release} failed: {reasons[0]}")
            session.flush()
            return row

    def release_audits(self, family: str | None = None, base: str | None = None) -> list[ReleaseAuditRow]:
        """The newest audits, newest first."""
        query = select(ReleaseAuditRow).order_by(ReleaseAuditRow.id.desc()).limit(100)
        if family is not None:
            query = query.where(ReleaseAuditRow.family == family)
        return self._all(query if base is None else query.where(ReleaseAuditRow.base == base))

    def unaudited(self, family: Family, base: str | None = None) -> set[str]:
        """The adapters that answered everybody since the newest audit."""
        audits = self.release_audits(family, base)
        newest = audits[0].release if audits else 0
        releases = self.releases(RELEASES, base if family == "clip" else None)
        names = (row.adapter(family) for row in releases if row.plain and row.number > newest)
        return {name for name in names if name} - {row.adapter for row in audits}

    def audited_data(self, family: str) -> dict[str, int]:
        """End of the data of the newest audit; empty without one."""
        return next((dict(row.data_to) for row in self.release_audits(family)), {})

    def failed_audit(self, family: Family) -> ReleaseAuditRow | None:
        """The newest audit, if it failed and its adapter still is the stable one."""
        newest, stable = next(iter(self.release_audits(family)), None), self.stable()
        if newest is None or newest.passed or stable is None or stable.adapter(family) != newest.adapter:
            return None
        return newest
