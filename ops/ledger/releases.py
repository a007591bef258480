"""Verbs of release: proposals, releases, hold. Every change leaves an audit row in the same transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ops.errors import LedgerError, ReleaseConflict
from ops.ledger import tables as t
from ops.ledger.audit import note
from ops.ledger.database import Database, as_row
from ops.ledger.release_events import tell_proposal, tell_release
from ops.ledger.rows import Family, HoldRow, ProposalKind, ProposalRow, ProposalState, ReleaseRow, Scope


class ReleaseVerbs:
    """What the release controller and operators write."""

    database: Database

    def propose(
        self,
        kind: ProposalKind,
        *,
        family: Scope = "clip",
        clip: str | None = None,
        vlm: str | None = None,
        actor: str,
        reason: str,
        update_id: str | None = None,
        expected_live: int | None = None,
        share: float = 1.0,
        forced: bool = False,
    ) -> ProposalRow:
        """Record a wish to release. An update proposes once: a second call returns the first proposal.

        Args:
            family: which of ``clip`` and ``vlm`` is meant; the other stays what is live when this is committed.
            share: of the requests, 0 to 1; see :attr:`ReleaseRow.share`.
            forced: an operator insists, though no gate passed it.

        Raises:
            ReleaseConflict: ``expected_live`` is not the live release any more.
            LedgerError: the share is not one.
        """
        if not 0.0 <= share <= 1.0:
            raise LedgerError(f"a share of {share} is not between 0 and 1.", "0.1 is a tenth of the requests.")
        with self.database.write() as session:
            if update_id is not None:
                found = session.scalars(select(t.Proposal).where(t.Proposal.update_id == update_id)).first()
                if found is not None:
                    return as_row(ProposalRow, found)
            live = _live(session)
            if expected_live is not None and expected_live != (live.number if live else 0):
                raise ReleaseConflict(
                    f"release {live.number if live else 0} is live, not {expected_live}: somebody released first.",
                    "Look at `ratchet releases list` and decide again.",
                )
            row = t.Proposal(
                kind=kind, family=family, clip=clip, vlm=vlm, actor=actor, reason=reason, state="pending",
                update_id=update_id, expected_live=expected_live, share=share, forced=forced,
            )  # fmt: skip
            session.add(row)
            session.flush()
            note(
                session,
                actor,
                f"propose {kind}",
                f"proposal {row.id}",
                {"family": family, "clip": clip, "vlm": vlm, "reason": reason, **_rollout(share, forced)},
            )
            tell_proposal(session, row)
            return as_row(ProposalRow, row)

    def proposal(self, proposal_id: int) -> ProposalRow:
        """One proposal. Raises LedgerError."""
        with self.database.read() as session:
            return as_row(ProposalRow, _proposal(session, proposal_id))

    def proposals(self, limit: int = 50) -> list[ProposalRow]:
        """The newest proposals, newest first."""
        with self.database.read() as session:
            found = session.scalars(select(t.Proposal).order_by(t.Proposal.id.desc()).limit(limit))
            return [as_row(ProposalRow, row) for row in found]

    def pending_proposals(self) -> list[ProposalRow]:
        """Proposals not decided yet, oldest first; ``preparing`` ones were left by a killed controller."""
        query = select(t.Proposal).where(t.Proposal.state.in_(("pending", "preparing"))).order_by(t.Proposal.id)
        with self.database.read() as session:
            return [as_row(ProposalRow, row) for row in session.scalars(query)]

    def advance_proposal(self, proposal_id: int, state: ProposalState, error: str | None = None) -> ProposalRow:
        """Move a proposal on. ``committed`` is set by :meth:`commit_release` alone."""
        with self.database.write() as session:
            row = _proposal(session, proposal_id)
            row.state, row.error = state, error
            if state == "failed":
                note(session, "controller", "proposal failed", f"proposal {row.id}", {"error": error})
            session.flush()
            tell_proposal(session, row)
            return as_row(ProposalRow, row)

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
    ) -> ReleaseRow:
        """Append a release, and mark its proposal committed, in one transaction.

        Raises:
            ReleaseConflict: the number is taken, or is not the live number + 1.
        """
        try:
            with self.database.write() as session:
                live = _live(session)
                expected = (live.number if live else 0) + 1
                if number != expected:
                    raise ReleaseConflict(
                        f"release {number} cannot be next: {expected} is.", "Prepare again from what is live."
                    )
                row = t.Release(
                    number=number, clip=clip, vlm=vlm, actor=actor, reason=reason, proposal_id=proposal_id, share=share
                )
                session.add(row)
                proposal = None if proposal_id is None else _proposal(session, proposal_id)
                if proposal is not None:
                    proposal.state, proposal.release, proposal.share = "committed", number, share
                note(
                    session,
                    actor,
                    "release",
                    f"release {number}",
                    {
                        "clip": clip, "vlm": vlm, "reason": reason,
                        **_rollout(share, proposal is not None and proposal.forced),
                    },
                )  # fmt: skip
                session.flush()
                tell_release(session, row, proposal, previous=number - 1 or None)
                return as_row(ReleaseRow, row)
        except IntegrityError:
            raise ReleaseConflict(
                f"release {number} was taken by somebody else.", "Look at what is live now."
            ) from None

    def live(self) -> ReleaseRow | None:
        """The live release: the highest number. None before the first start."""
        with self.database.read() as session:
            found = _live(session)
            return None if found is None else as_row(ReleaseRow, found)

    def release(self, number: int) -> ReleaseRow:
        """One release. Raises LedgerError."""
        with self.database.read() as session:
            found = session.get(t.Release, number)
            if found is None:
                raise LedgerError(f"release {number} does not exist.", "See `ratchet releases list`.")
            return as_row(ReleaseRow, found)

    def releases(self, limit: int = 50) -> list[ReleaseRow]:
        """The newest releases, newest first."""
        with self.database.read() as session:
            found = session.scalars(select(t.Release).order_by(t.Release.number.desc()).limit(limit))
            return [as_row(ReleaseRow, row) for row in found]

    def before(self, family: Family, adapter: str | None) -> ReleaseRow | None:
        """The newest plain release whose adapter of this family is another one, and was not withdrawn."""
        column = t.Release.clip if family == "clip" else t.Release.vlm
        withdrawn = select(t.Adapter.name).where(t.Adapter.withdrawn.is_not(None))
        query = (
            select(t.Release)
            .where(t.Release.share >= 1, column.is_distinct_from(adapter))
            .where(or_(column.is_(None), column.not_in(withdrawn)))
            .order_by(t.Release.number.desc())
            .limit(1)
        )
        with self.database.read() as session:
            found = session.scalars(query).first()
            return None if found is None else as_row(ReleaseRow, found)

    def hold(self, actor: str, reason: str) -> HoldRow:
        """Let update proposals wait until :meth:`resume`. A second hold keeps the first."""
        with self.database.write() as session:
            row = _open_hold(session)
            if row is None:
                row = t.Hold(actor=actor, reason=reason)
                session.add(row)
                note(session, actor, "hold", "updates", {"reason": reason})
                session.flush()
            return as_row(HoldRow, row)

    def resume(self, actor: str, reason: str) -> None:
        """End a hold. Raises LedgerError when nothing is held."""
        with self.database.write() as session:
            row = _open_hold(session)
            if row is None:
                raise LedgerError("updates are not on hold.", "There is nothing to resume.")
            row.resumed_at = t.utc_now()
            note(session, actor, "resume", "updates", {"reason": reason})

    def held(self) -> HoldRow | None:
        """The open hold, if there is one."""
        with self.database.read() as session:
            row = _open_hold(session)
            return None if row is None else as_row(HoldRow, row)


def _rollout(share: float, forced: bool) -> dict[str, Any]:
    """What the audit says beyond a plain release."""
    return ({} if share >= 1 else {"share": share}) | ({"forced": True} if forced else {})


def _live(session: Session) -> t.Release | None:
    return session.scalars(select(t.Release).order_by(t.Release.number.desc()).limit(1)).first()


def _open_hold(session: Session) -> t.Hold | None:
    return session.scalars(select(t.Hold).where(t.Hold.resumed_at.is_(None)).order_by(t.Hold.id)).first()


def _proposal(session: Session, proposal_id: int) -> t.Proposal:
    found = session.get(t.Proposal, proposal_id)
    if found is None:
        raise LedgerError(f"proposal {proposal_id} does not exist.", "See `ratchet releases list`.")
    return found
