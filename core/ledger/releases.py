"""Queries of releases, their rollout, and holds, which keep updates from going live. Every change leaves an audit row
in the same transaction."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, func, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.errors import Held, LedgerError, ReleaseConflict
from core.ledger.collection import check_files
from core.ledger.database import Queries, write_once
from core.ledger.events import note, tell_release
from core.ledger.leases import CONTROLLER_LEASE, check_lease
from core.ledger.proposals import check_open, find_proposal, rollout_detail
from core.ledger.rows import (
    SYSTEM_ACTORS,
    AdapterRow,
    AuditRow,
    Family,
    HoldRow,
    ProposalRow,
    ReleaseRow,
    VerdictRow,
    utc_now,
)

PLAIN: Final = 1.0
NEWEST: Final = ReleaseRow.number.desc()
_OPEN_HOLD: Final = select(HoldRow).where(HoldRow.resumed_at.is_(None)).order_by(HoldRow.id)


class ReleaseQueries(Queries):
    """Releases, written by the release controller and the guard. The state of canaries, shadows and the guard is
    derived from rows that never change."""

    def commit_release(
        self,
        number: int,
        *,
        clip: str | None,
        vlm: str | None,
        actor: str,
        reason: str,
        proposal_id: int | None,
        share: float = 1.0,
        epoch: int | None = None,
        hold_after_rollback: bool = False,
    ) -> ReleaseRow:
        """Append a release and mark its proposal committed, in one transaction; see
        :func:`core.ledger.database.write_once`. ``hold_after_rollback`` opens a hold with an operator's rollback. The
        guard's rollbacks open none: it has withdrawn the adapter, and the next update was evaluated without it.

        Raises:
            ReleaseConflict: the number is taken or is not the live number + 1, or the proposal has ended.
            LeaseLost: another controller took over.
            Held: the proposal has to wait until an operator resumes.
            AdapterCollected: an adapter's files were deleted.
            CommitUnknown: the ledger was lost during COMMIT and did not come back.
        """
        attempt = secrets.token_hex(16)

        def write(session: Session, _repeated: bool) -> ReleaseRow:
            written = session.scalars(select(ReleaseRow).where(ReleaseRow.attempt == attempt)).first()
            if written is not None:
                return written
            if epoch is not None:
                check_lease(session, CONTROLLER_LEASE, epoch)
            proposal = None if proposal_id is None else find_proposal(session, proposal_id, lock=True)
            if proposal is not None:
                check_open(proposal)
                _check_hold(session, proposal, actor)
            check_number(session, number)
            row = ReleaseRow(
                number=number, clip=clip, vlm=vlm, actor=actor, reason=reason, proposal_id=proposal_id, share=share,
                clip_base=_base_of(session, clip),
            )  # fmt: skip
            row.attempt = attempt
            append_release(session, row, proposal)
            rolled_back = proposal is not None and proposal.kind == "rollback"
            if hold_after_rollback and rolled_back and actor not in SYSTEM_ACTORS and open_hold(session) is None:
                add_hold(session, actor, f"after the rollback of release {number - 1}: {reason}")
            return row

        try:
            return write_once(self.database, write, f"release {number}")
        except IntegrityError:
            raise ReleaseConflict(
                f"release {number} was taken by somebody else.", "Look at what is live now."
            ) from None

    def live(self) -> ReleaseRow | None:
        return self._first(select(ReleaseRow).order_by(NEWEST))

    def release(self, number: int) -> ReleaseRow:
        row = self._get(ReleaseRow, number)
        if row is None:
            raise LedgerError(f"release {number} does not exist.", "See `ratchet releases list`.")
        return row

    def releases(self, limit: int = 50, base: str | None = None) -> list[ReleaseRow]:
        """The newest releases, newest first; ``base``: only those with this CLIP base (digest)."""
        query = select(ReleaseRow).where(of_base(base)).order_by(NEWEST).limit(limit)
        return self._all(query)

    def before(self, family: Family, adapter: str | None, base: str | None = None) -> ReleaseRow | None:
        """The newest full release with another adapter of this family that was neither withdrawn nor collected;
        ``base``: only of this CLIP base."""
        column = ReleaseRow.clip if family == "clip" else ReleaseRow.vlm
        gone = or_(AdapterRow.withdrawn.is_not(None), AdapterRow.collected_at.is_not(None))
        excluded = select(AdapterRow.name).where(gone)
        query = (
            select(ReleaseRow)
            .where(ReleaseRow.share >= PLAIN, column.is_distinct_from(adapter), of_base(base))
            .where(or_(column.is_(None), column.not_in(excluded)))
            .order_by(NEWEST)
        )
        return self._first(query)

    def stable(self) -> ReleaseRow | None:
        """The newest full release, which answers the requests that a canary does not. None before the first start."""
        return self._first(select(ReleaseRow).where(ReleaseRow.share >= PLAIN).order_by(NEWEST))

    def incumbent(self, number: int, base: str | None = None) -> ReleaseRow | None:
        """The newest full release before ``number``, for comparison and for the guard's rollback; ``base``: only of
        this CLIP base."""
        plain = select(ReleaseRow).where(ReleaseRow.share >= PLAIN, of_base(base), ReleaseRow.number < number)
        return self._first(plain.order_by(NEWEST))

    def was_stable(self, family: Family, adapter: str | None) -> bool:
        """True if an adapter (None: the base alone) was in a full release."""
        column = ReleaseRow.clip if family == "clip" else ReleaseRow.vlm
        query = select(ReleaseRow.number).where(ReleaseRow.share >= PLAIN, column.is_not_distinct_from(adapter))
        return self._first(query) is not None

    def withdrawn(self, names: Sequence[str | None]) -> dict[str, str]:
        return self._of_adapters(AdapterRow.withdrawn, names)

    def withdraw(
        self, names: Sequence[str | None], *, actor: str, subject: str, reason: str, evidence: dict[str, Any]
    ) -> None:
        """Mark adapters, so that they are not released again automatically, and record why. The first reason stays."""
        with self.database.write() as session:
            for name in names:
                row = None if name is None else session.get(AdapterRow, name)
                if row is not None:
                    row.withdrawn = row.withdrawn or reason
            detail = {"reason": reason, "adapters": [name for name in names if name is not None], **evidence}
            session.add(AuditRow(actor=actor, action="withdraw", subject=subject, detail=detail))

    def unproven(self, name: str) -> str:
        """Reason why releasing an adapter needs force; empty if it passed the gate, or was live before."""
        with self.database.read() as session:
            adapter = session.get(AdapterRow, name)
            if adapter is not None and adapter.withdrawn:
                return f"{name} was withdrawn: {adapter.withdrawn}"
            served = select(ReleaseRow.number).where(
                or_(ReleaseRow.clip == name, ReleaseRow.vlm == name), ReleaseRow.share >= PLAIN
            )
            passed = select(VerdictRow.id).where(VerdictRow.adapter == name, VerdictRow.outcome == "passed")
            if session.scalars(served.limit(1)).first() or session.scalars(passed.limit(1)).first():
                return ""
            return f"{name} has no passed verdict in the ledger and was never live"

    def change_base(
        self,
        live: ReleaseRow,
        *,
        clip: str | None,
        base: str,
        live_base: str,
        rollback: bool,
        actor: str,
        reason: str,
        update_id: str | None = None,
    ) -> ReleaseRow:
        """Release an adapter of another base, with the live VLM adapter, in one transaction with its proposal, so that
        no controller of the old base finds that open. Releases without a base are set to ``live_base``. ``update_id``
        is the upgrade that made the adapter; ``rollback`` returns to an earlier release's adapter. Raises
        ReleaseConflict unless ``live`` is still the live release, and full."""
        attempt = secrets.token_hex(16)

        def write(session: Session, _repeated: bool) -> ReleaseRow:
            written = session.scalars(select(ReleaseRow).where(ReleaseRow.attempt == attempt)).first()
            if written is not None:
                return written
            number = live.number + 1
            check_number(session, number)
            if not live.plain:
                raise ReleaseConflict(
                    f"release {live.number} is on trial.", "Promote it or take it back before the base changes."
                )
            unknown = update(ReleaseRow).where(ReleaseRow.clip_base.is_(None))
            session.execute(unknown.values(clip_base=live_base))
            proposal = ProposalRow(
                kind="rollback" if rollback else "release", family="clip", clip=clip, vlm=None, actor=actor,
                reason=reason, state="preparing", update_id=update_id, expected_live=live.number,
            )  # fmt: skip
            proposal.attempt = attempt
            session.add(proposal)
            session.flush()
            row = ReleaseRow(
                number=number, clip=clip, vlm=live.vlm, actor=actor, reason=reason, proposal_id=proposal.id,
                clip_base=base, share=PLAIN,
            )  # fmt: skip
            row.attempt = attempt
            append_release(session, row, proposal)
            detail = {"from": live_base, "to": base, "clip": clip, "rollback": rollback}
            note(session, actor, "change base", f"release {number}", detail)
            return row

        return write_once(self.database, write, f"release {live.number + 1}")

    def newest_of_each_base(self) -> list[ReleaseRow]:
        numbers = (
            select(func.max(ReleaseRow.number))
            .where(ReleaseRow.share >= PLAIN, ReleaseRow.clip_base.is_not(None))
            .group_by(ReleaseRow.clip_base)
        )
        return self._all(select(ReleaseRow).where(ReleaseRow.number.in_(numbers)).order_by(NEWEST))

    def image_spaces_of_bases(self) -> set[str]:
        """Image spaces of :meth:`newest_of_each_base`, which another base's servers search, or will after switching
        back. The ledger does not know the space of a base alone."""
        clips = [row.clip for row in self.newest_of_each_base() if row.clip is not None]
        return set(self._all(select(AdapterRow.image_space).where(AdapterRow.name.in_(clips))))

    def hold(self, actor: str, reason: str) -> HoldRow:
        """Make update proposals wait until :meth:`resume`. A second hold keeps the first."""
        return write_once(
            self.database, lambda session, _: open_hold(session) or add_hold(session, actor, reason), "the hold"
        )

    def resume(self, actor: str, reason: str) -> None:
        """End a hold. Raises LedgerError if there is none."""

        def write(session: Session, repeated: bool) -> None:
            row = open_hold(session)
            if row is None and not repeated:
                raise LedgerError("updates are not on hold.", "There is nothing to resume.")
            if row is not None:
                row.resumed_at = utc_now()
                note(session, actor, "resume", "updates", {"reason": reason})

        write_once(self.database, write, "the end of the hold")

    def held(self) -> HoldRow | None:
        return self._first(_OPEN_HOLD)


def of_base(base: str | None) -> ColumnElement[bool]:
    """Condition that a release's CLIP has a base; always true for None. Releases without a base are from when there was
    only one."""
    return true() if base is None else or_(ReleaseRow.clip_base == base, ReleaseRow.clip_base.is_(None))


def _live(session: Session) -> ReleaseRow | None:
    return session.scalars(select(ReleaseRow).order_by(NEWEST).limit(1)).first()


def _base_of(session: Session, clip: str | None) -> str | None:
    """The recorded base of an adapter; the live base for None or an unrecorded one."""
    adapter = None if clip is None else session.get(AdapterRow, clip)
    if adapter is not None:
        return adapter.base
    live = _live(session)
    return None if live is None else live.clip_base


def check_number(session: Session, number: int) -> None:
    """Raise ReleaseConflict unless this is the number of the next release."""
    live = _live(session)
    expected = (live.number if live else 0) + 1
    if number != expected:
        raise ReleaseConflict(f"release {number} cannot be next: {expected} is.", "Prepare again from what is live.")


def append_release(session: Session, row: ReleaseRow, proposal: ProposalRow | None) -> None:
    """Add a release, with audit row and event, and end its proposal. Raises AdapterCollected if an adapter's files were
    deleted."""
    check_files(session, (row.clip, row.vlm))
    session.add(row)
    if proposal is not None:
        proposal.state, proposal.release, proposal.share = "committed", row.number, row.share
    forced = proposal is not None and proposal.forced
    detail = {"clip": row.clip, "vlm": row.vlm, "reason": row.reason, **rollout_detail(row.share, forced)}
    note(session, row.actor, "release", f"release {row.number}", detail)
    session.flush()
    tell_release(session, row, proposal, previous=row.number - 1 or None)


def open_hold(session: Session) -> HoldRow | None:
    return session.scalars(_OPEN_HOLD).first()


def add_hold(session: Session, actor: str, reason: str) -> HoldRow:
    row = HoldRow(actor=actor, reason=reason)
    session.add(row)
    note(session, actor, "hold", "updates", {"reason": reason})
    session.flush()
    return row


def _check_hold(session: Session, proposal: ProposalRow, actor: str) -> None:
    """Raise Held if a hold is open and the release is automatic: updates, and promotions that no operator requested."""
    by_itself = proposal.kind == "update" or (proposal.kind == "promotion" and actor in SYSTEM_ACTORS)
    held = open_hold(session) if by_itself else None
    if held is not None:
        raise Held(
            f"proposal {proposal.id} waits: {held.actor} holds updates ({held.reason}).",
            "`ratchet releases resume` lets it go on.",
        )
