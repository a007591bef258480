"""Queries of releases: what is live, and what was. Every change leaves an audit row in the same transaction."""

from __future__ import annotations

import secrets

from sqlalchemy import ColumnElement, or_, select, true
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.errors import LedgerError, ReleaseConflict
from core.ledger import tables as t
from core.ledger.collection import check_files
from core.ledger.database import Database, as_row, write_once
from core.ledger.events import note, tell_release
from core.ledger.holds import add_hold, check_hold, open_hold
from core.ledger.leases import CONTROLLER_LEASE, check_lease
from core.ledger.proposals import check_open, find_proposal, rollout_detail
from core.ledger.rows import SYSTEM_ACTORS, Family, ReleaseRow


class ReleaseQueries:
    """What the release controller writes, and everybody reads."""

    database: Database

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
        attempt: str | None = None,
    ) -> ReleaseRow:
        """Append a release, and mark its proposal committed, in one transaction. When the answer to COMMIT is lost, the
        release is looked up; see :mod:`core.ledger.database`.

        Args:
            epoch: of the controller's lease.
            hold_after_rollback: open a hold with an operator's rollback. Rollbacks of the guard open none: it has
                withdrawn the adapter that it takes back, and the next update was judged without it.
            attempt: names this commit (at most 32 characters); a second call with the same one returns the release of
                the first. For callers that repeat a commit after CommitUnknown.

        Raises:
            ReleaseConflict: the number is taken or is not the live number + 1, or the proposal has ended.
            LeaseLost: another controller took over.
            Held: the proposal has to wait until an operator resumes.
            AdapterCollected: the files of an adapter are gone.
            CommitUnknown: the ledger went away during COMMIT and did not come back.
        """
        attempt = attempt or secrets.token_hex(16)

        def write(session: Session, _repeated: bool) -> ReleaseRow:
            written = session.scalars(select(t.Release).where(t.Release.attempt == attempt)).first()
            if written is not None:
                return as_row(ReleaseRow, written)
            if epoch is not None:
                check_lease(session, CONTROLLER_LEASE, epoch)
            proposal = None if proposal_id is None else find_proposal(session, proposal_id, lock=True)
            if proposal is not None:
                check_open(proposal)
                check_hold(session, proposal, actor)
            check_number(session, number)
            row = t.Release(
                number=number, clip=clip, vlm=vlm, actor=actor, reason=reason, proposal_id=proposal_id, share=share,
                attempt=attempt, clip_base=_base_of(session, clip),
            )  # fmt: skip
            append_release(session, row, proposal)
            if hold_after_rollback and proposal is not None and proposal.kind == "rollback":
                _hold_after_rollback(session, row)
            return as_row(ReleaseRow, row)

        try:
            return write_once(self.database, write, f"release {number}")
        except IntegrityError:
            raise ReleaseConflict(
                f"release {number} was taken by somebody else.", "Look at what is live now."
            ) from None

    def live(self) -> ReleaseRow | None:
        """The live release: the highest number. None before the first start."""
        with self.database.read() as session:
            row = _live(session)
            return None if row is None else as_row(ReleaseRow, row)

    def release(self, number: int) -> ReleaseRow:
        """One release. Raises LedgerError."""
        with self.database.read() as session:
            row = session.get(t.Release, number)
            if row is None:
                raise LedgerError(f"release {number} does not exist.", "See `ratchet releases list`.")
            return as_row(ReleaseRow, row)

    def releases(self, limit: int = 50, base: str | None = None) -> list[ReleaseRow]:
        """The newest releases, newest first. ``base``: only those whose CLIP has this base (its digest)."""
        query = select(t.Release).where(of_base(base)).order_by(t.Release.number.desc()).limit(limit)
        with self.database.read() as session:
            return [as_row(ReleaseRow, row) for row in session.scalars(query)]

    def before(self, family: Family, adapter: str | None, base: str | None = None) -> ReleaseRow | None:
        """The newest plain release whose adapter of this family is another one, and was neither withdrawn nor
        collected; with ``base`` only of those whose CLIP has this base.
        """
        column = t.Release.clip if family == "clip" else t.Release.vlm
        gone = or_(t.Adapter.withdrawn.is_not(None), t.Adapter.collected_at.is_not(None))
        excluded = select(t.Adapter.name).where(gone)
        query = (
            select(t.Release)
            .where(t.Release.share >= 1, column.is_distinct_from(adapter), of_base(base))
            .where(or_(column.is_(None), column.not_in(excluded)))
            .order_by(t.Release.number.desc())
            .limit(1)
        )
        with self.database.read() as session:
            row = session.scalars(query).first()
            return None if row is None else as_row(ReleaseRow, row)


def of_base(base: str | None) -> ColumnElement[bool]:
    """The condition that a release's CLIP has a base; without one it holds always. Releases that name no base are of
    the only one that there was."""
    return true() if base is None else or_(t.Release.clip_base == base, t.Release.clip_base.is_(None))


def _live(session: Session) -> t.Release | None:
    return session.scalars(select(t.Release).order_by(t.Release.number.desc()).limit(1)).first()


def _base_of(session: Session, clip: str | None) -> str | None:
    """The base that an adapter is recorded with; of the base alone, and of one that is not recorded, the live one."""
    adapter = None if clip is None else session.get(t.Adapter, clip)
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


def append_release(session: Session, row: t.Release, proposal: t.Proposal | None) -> None:
    """Add a release, with its note and its event, and end its proposal.

    Raises:
        AdapterCollected: the files of one of its adapters are gone.
    """
    check_files(session, (row.clip, row.vlm))
    session.add(row)
    if proposal is not None:
        proposal.state, proposal.release, proposal.share = "committed", row.number, row.share
    forced = proposal is not None and proposal.forced
    detail = {"clip": row.clip, "vlm": row.vlm, "reason": row.reason, **rollout_detail(row.share, forced)}
    note(session, row.actor, "release", f"release {row.number}", detail)
    session.flush()
    tell_release(session, row, proposal, previous=row.number - 1 or None)


def _hold_after_rollback(session: Session, row: t.Release) -> None:
    if row.actor not in SYSTEM_ACTORS and open_hold(session) is None:
        add_hold(session, row.actor, f"after the rollback of release {row.number - 1}: {row.reason}")
