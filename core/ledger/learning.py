"""Queries of the updater: adapters, updates, verdicts, and base upgrades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, true
from sqlalchemy.orm import Session

from core.errors import LedgerError
from core.ledger.collection import restore_mark
from core.ledger.database import Queries
from core.ledger.events import add_event, clipped, note
from core.ledger.rows import (
    AdapterRow,
    BaseUpgradeRow,
    Family,
    GateOutcome,
    ProposalRow,
    ReleaseRow,
    UpdateRow,
    UpdateState,
    VerdictRow,
)

RELEASED_VERDICTS = 500
FINISHED = ("done", "failed", "abandoned")
BEGAN = "began"
"""Key in an update's cost: the place a process is working at, and how many have died there."""
TRIGGER = "trigger"
"""Key in an update's cost: why it began; missing in those of imports and upgrades."""


class LearningQueries(Queries):
    def register_adapter(
        self,
        name: str,
        family: Family,
        base: str,
        image_space: str,
        text_space: str,
        meta: dict[str, Any],
        *,
        digest: str | None = None,
    ) -> AdapterRow:
        """Record an adapter. Idempotent, so that a restart may repeat it. Clears a finished collection: store the files
        after this call. ``digest``: :func:`core.artifacts.directory_digest` of its directory, checked on loading,
        because the name has only 48 bits of one. Raises LedgerError if it is recorded with other spaces or another
        digest, or its files are being collected."""
        with self.database.write() as session:
            row = session.get(AdapterRow, name, with_for_update=True)
            if row is None:
                row = AdapterRow(
                    name=name, family=family, base=base, image_space=image_space, text_space=text_space, meta=meta,
                    digest=digest,
                )  # fmt: skip
                session.add(row)
                session.flush()
            elif (row.base, row.image_space, row.text_space) != (base, image_space, text_space):
                raise LedgerError(f"adapter {name!r} is recorded with other spaces.", "A name is never reused.")
            elif digest is not None and row.digest not in (None, digest):
                raise LedgerError(f"adapter {name!r} is recorded with another digest.", "A name is never reused.")
            row.digest = row.digest or digest
            restore_mark(row)
            return row

    def adapter(self, name: str) -> AdapterRow:
        """One adapter. Raises LedgerError if it was never recorded."""
        row = self._get(AdapterRow, name)
        if row is None:
            raise LedgerError(f"adapter {name!r} is not in the ledger.", "See `ratchet releases list`.")
        return row

    def adapter_digests(self, names: Sequence[str | None]) -> dict[str, str]:
        return self._of_adapters(AdapterRow.digest, names)

    def begin_update(
        self,
        update_id: str,
        *,
        family: Family,
        recipe: dict[str, Any],
        seed: int,
        store_version: int,
        data_from: dict[str, int],
        data_to: dict[str, int],
        incumbent: str | None,
        adapter: str | None = None,
        cost: dict[str, Any] | None = None,
    ) -> UpdateRow:
        """Record the start of an update; the same ID again returns the existing row. ``adapter``: one in the ledger
        already, from elsewhere or an earlier update, which only needs a verdict. ``cost``: earlier spending on it."""
        with self.database.write() as session:
            row = session.get(UpdateRow, update_id)
            if row is None:
                row = UpdateRow(
                    id=update_id, family=family, state="trained" if adapter else "training", recipe=recipe, seed=seed,
                    store_version=store_version, data_from=data_from, data_to=data_to, incumbent=incumbent,
                    adapter=adapter, cost=cost or {},
                )  # fmt: skip
                session.add(row)
                session.flush()
                if adapter is not None:
                    _tell_candidate(session, row)
            return row

    def advance_update(
        self,
        update_id: str,
        state: UpdateState | None = None,
        *,
        adapter: str | None = None,
        cost: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> UpdateRow:
        """Update the given fields. Raises LedgerError if it has ended, also by an operator; a finished upgrade can be
        abandoned until it is live."""
        with self.database.write() as session:
            row = _update(session, update_id)
            dropped = (row.state, state) == ("done", "abandoned")
            if row.state in FINISHED and state not in (None, row.state) and not dropped:
                raise LedgerError(f"{update_id} has ended ({row.state}): {row.error or 'no error'}.", "Begin another.")
            row.state = state or row.state
            row.adapter = adapter or row.adapter
            row.error = error or row.error
            if cost is not None:
                row.cost = {**row.cost, **cost}
            session.flush()
            if adapter is not None:
                _tell_candidate(session, row)
            return row

    def abandon_update(self, update_id: str, *, actor: str, reason: str) -> UpdateRow:
        """End an update as failed. Raises LedgerError if it has ended."""
        with self.database.write() as session:
            row = _update(session, update_id)
            if row.state in FINISHED:
                raise LedgerError(f"{update_id} has ended already: it is {row.state}.", "See `ratchet status`.")
            note(session, actor, "update.abandon", f"update {update_id}", {"reason": reason, "state": row.state})
            row.state, row.error = "failed", f"abandoned by {actor}: {reason}"
            session.flush()
            return row

    def retry_update(self, update_id: str, *, actor: str) -> UpdateRow:
        """Reset an update's attempts, so that the updater takes it again: an unfinished one, or its family's newest
        that failed or was abandoned before a verdict. Raises LedgerError for others."""
        with self.database.write() as session:
            row = _update(session, update_id)
            if row.state in FINISHED:
                newest = (
                    select(UpdateRow.id).where(UpdateRow.family == row.family).order_by(UpdateRow.created_at.desc())
                )
                judged = session.scalars(select(VerdictRow.id).where(VerdictRow.update_id == update_id)).first()
                if row.state == "done" or judged is not None or session.scalars(newest).first() != update_id:
                    raise LedgerError(
                        f"{update_id} is {row.state}, and it was judged or is not the newest one of its family.",
                        "Begin another on the same data: `ratchet trainer --once --retry`.",
                    )
            note(session, actor, "update.retry", f"update {update_id}", {"state": row.state, "error": row.error})
            if row.state in FINISHED:
                row.state = "trained" if row.adapter else "training"
            row.error = None
            row.cost = {**row.cost, "attempts": 0, BEGAN: None}
            session.flush()
            return row

    def compare_update(
        self, update_id: str, *, store_version: int, data_from: dict[str, int], incumbent: str | None
    ) -> UpdateRow:
        """Set what a trained update is compared with; no effect once it has a verdict."""
        with self.database.write() as session:
            row = _update(session, update_id)
            judged = session.scalars(select(VerdictRow.id).where(VerdictRow.update_id == update_id)).first()
            if row.state == "trained" and judged is None:
                row.store_version, row.data_from, row.incumbent = store_version, data_from, incumbent
                session.flush()
            return row

    def update_of(self, adapter: str) -> UpdateRow | None:
        return self._first(select(UpdateRow).where(UpdateRow.adapter == adapter).order_by(UpdateRow.created_at.desc()))

    def update(self, update_id: str) -> UpdateRow:
        with self.database.read() as session:
            return _update(session, update_id)

    def updates(self, limit: int = 50, family: str | None = None) -> list[UpdateRow]:
        query = select(UpdateRow).order_by(UpdateRow.created_at.desc(), UpdateRow.id).limit(limit)
        if family is not None:
            query = query.where(UpdateRow.family == family)
        return self._all(query)

    def is_finished(self, update_id: str) -> bool:
        row = self._get(UpdateRow, update_id)
        return row is not None and row.state in FINISHED

    def unfinished_update(self, family: Family) -> UpdateRow | None:
        """The oldest unfinished update: left by a killed trainer, or imported."""
        query = select(UpdateRow).where(UpdateRow.family == family, UpdateRow.state.not_in(FINISHED))
        return self._first(query.order_by(UpdateRow.created_at))

    def record_verdict(
        self, update_id: str, adapter: str, outcome: GateOutcome, report_key: str, summary: dict[str, Any]
    ) -> VerdictRow:
        """Record the gate's verdict; an update has one, and a second call returns the first."""
        with self.database.write() as session:
            row = session.scalars(select(VerdictRow).where(VerdictRow.update_id == update_id)).first()
            if row is None:
                row = VerdictRow(
                    update_id=update_id, adapter=adapter, outcome=outcome, report_key=report_key, summary=summary
                )
                session.add(row)
                session.flush()
                _tell_verdict(session, row)
            return row

    def verdicts(self, limit: int = 50) -> list[VerdictRow]:
        return self._all(select(VerdictRow).order_by(VerdictRow.id.desc()).limit(limit))

    def verdict_of(self, update_id: str) -> VerdictRow | None:
        return self._first(select(VerdictRow).where(VerdictRow.update_id == update_id))

    def verdicts_of(self, family: str, limit: int = 50) -> list[VerdictRow]:
        query = (
            select(VerdictRow).join(UpdateRow, UpdateRow.id == VerdictRow.update_id).where(UpdateRow.family == family)
        )
        return self._all(query.order_by(VerdictRow.id.desc()).limit(limit))

    def verdict_on(self, adapter: str) -> VerdictRow | None:
        return self._first(select(VerdictRow).where(VerdictRow.adapter == adapter).order_by(VerdictRow.id.desc()))

    def cross_version(self, adapter: str | None) -> dict[str, Any] | None:
        """The gate's measurement of an adapter's texts in its incumbent's images; None without one."""
        verdict = None if adapter is None else self.verdict_on(adapter)
        return None if verdict is None else verdict.summary.get("cross_version")

    def released_verdicts(self, family: str, base: str) -> list[VerdictRow]:
        """Verdicts on adapters of a base (digest) that were fully released, and neither withdrawn nor collected, newest
        first."""
        column = ReleaseRow.clip if family == "clip" else ReleaseRow.vlm
        released = select(column).where(column.is_not(None), ReleaseRow.share >= 1)
        query = (
            select(VerdictRow)
            .join(AdapterRow, AdapterRow.name == VerdictRow.adapter)
            .where(VerdictRow.adapter.in_(released), AdapterRow.base == base, AdapterRow.withdrawn.is_(None))
            .where(AdapterRow.collected_at.is_(None))
            .order_by(VerdictRow.id.desc())
            .limit(RELEASED_VERDICTS)
        )
        return self._all(query)

    def looks_since_release(self, family: str) -> list[VerdictRow]:
        """A family's verdicts that spent alpha since its last released update, oldest first. Verdicts of earlier
        versions do not say whether they did, and count."""
        last = (
            select(func.max(VerdictRow.id))
            .join(ProposalRow, ProposalRow.update_id == VerdictRow.update_id)
            .join(UpdateRow, UpdateRow.id == VerdictRow.update_id)
            .where(ProposalRow.state == "committed", UpdateRow.family == family)
        )
        spent = func.coalesce(VerdictRow.summary["spent"].as_boolean(), true())
        with self.database.read() as session:
            since = session.scalar(last) or 0
            query = select(VerdictRow).join(UpdateRow, UpdateRow.id == VerdictRow.update_id)
            query = query.where(VerdictRow.id > since, UpdateRow.family == family, spent).order_by(VerdictRow.id)
            return list(session.scalars(query))

    def judgements_of(self, family: str, role: str | None = None) -> dict[str, int]:
        """By suite (of a role) the number of verdicts of a family that asked it so far."""
        used: dict[str, int] = {}
        for verdict in self.verdicts_of(family):
            for name, suite in verdict.summary.get("suites", {}).items():
                if role in (None, suite["role"]):
                    used[name] = max(used.get(name, 0), suite.get("used", 0) + 1)
        return used

    def begin_base_upgrade(
        self,
        update_id: str,
        *,
        recipe: dict[str, Any],
        seed: int,
        store_version: int,
        data_to: dict[str, int],
        incumbent: str | None,
        old: tuple[str, str],
        new: tuple[str, str],
        gflops: float,
        actor: str,
    ) -> UpdateRow:
        """Record an update that learns everything before ``data_to`` again; the same ID again returns the existing row.
        ``old`` and ``new`` are digest and name of a base; ``gflops`` is the budget in MAF-GFLOPs."""
        with self.database.write() as session:
            row = session.get(UpdateRow, update_id)
            if row is None:
                row = UpdateRow(
                    id=update_id, family="clip", state="training", recipe=recipe, seed=seed,
                    store_version=store_version, data_from={}, data_to=data_to, incumbent=incumbent,
                )  # fmt: skip
                session.add(row)
                session.flush()
                session.add(
                    BaseUpgradeRow(
                        update_id=update_id, old_base=old[0], old_name=old[1], new_base=new[0], new_name=new[1],
                        gflops=gflops, actor=actor,
                    )
                )  # fmt: skip
                detail = {"from": old[1], "to": new[1], "gflops": gflops}
                note(session, actor, "upgrade base", f"update {update_id}", detail)
            return row

    def base_upgrade(self, update_id: str) -> BaseUpgradeRow | None:
        return self._get(BaseUpgradeRow, update_id)

    def approved_upgrade(self, new_base: str | None = None) -> BaseUpgradeRow | None:
        """The newest upgrade (optionally to a base, by digest) that passed the gate and was neither released, cancelled
        nor withdrawn."""
        query = (
            select(BaseUpgradeRow)
            .join(UpdateRow, UpdateRow.id == BaseUpgradeRow.update_id)
            .join(VerdictRow, VerdictRow.update_id == BaseUpgradeRow.update_id)
            .join(AdapterRow, AdapterRow.name == UpdateRow.adapter)
            .where(UpdateRow.state == "done", VerdictRow.outcome == "passed", AdapterRow.withdrawn.is_(None))
            .where(UpdateRow.adapter.not_in(select(ReleaseRow.clip).where(ReleaseRow.clip.is_not(None))))
            .order_by(BaseUpgradeRow.created_at.desc())
        )
        if new_base is not None:
            query = query.where(BaseUpgradeRow.new_base == new_base)
        return self._first(query)


def _update(session: Session, update_id: str) -> UpdateRow:
    row = session.get(UpdateRow, update_id)
    if row is None:
        raise LedgerError(f"update {update_id!r} is not in the ledger.", "See `ratchet status`.")
    return row


def _tell_candidate(session: Session, row: UpdateRow) -> None:
    data = {
        "update": row.id, "adapter": row.adapter, "family": row.family, "data_from": row.data_from,
        "data_to": row.data_to, "trigger": row.cost.get(TRIGGER),
    }  # fmt: skip
    add_event(session, "ratchet.candidate.v1", f"candidate-{row.id}", f"updates/{row.id}", data)


def _tell_verdict(session: Session, row: VerdictRow) -> None:
    reasons = [clipped(str(reason)) for reason in row.summary.get("reasons", [])][:20]
    data = {"update": row.update_id, "adapter": row.adapter, "outcome": row.outcome, "reasons": reasons}
    add_event(session, "ratchet.verdict.v1", f"verdict-{row.update_id}", f"updates/{row.update_id}", data)
