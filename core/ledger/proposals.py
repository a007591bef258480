"""Queries of proposals, which are requests to release, and their state."""

from __future__ import annotations

import secrets
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.errors import LedgerError, ReleaseConflict
from core.ledger.collection import check_files
from core.ledger.database import Queries, write_once
from core.ledger.events import note, tell_proposal
from core.ledger.leases import CONTROLLER_LEASE, check_lease
from core.ledger.rows import ProposalKind, ProposalRow, ProposalState, ReleaseRow, Scope

ENDED: Final = ("committed", "failed")


class ProposalQueries(Queries):
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
        epoch: int | None = None,
    ) -> ProposalRow:
        """Record a proposal. An update proposes once: a second call returns the first proposal.

        Args:
            family: which of ``clip`` and ``vlm`` is set; the other stays as it is live at commit.
            forced: an operator insists, though no gate passed it.
            epoch: of the controller's lease, if the controller proposes.

        Raises ReleaseConflict if ``expected_live`` is no longer live, LeaseLost if another controller took over,
        LedgerError for an invalid share, and AdapterCollected if an adapter's files were deleted.
        """
        if not 0.0 <= share <= 1.0:
            raise LedgerError(f"a share of {share} is not between 0 and 1.", "0.1 is a tenth of the requests.")
        attempt = secrets.token_hex(16)

        def write(session: Session, _repeated: bool) -> ProposalRow:
            same = ProposalRow.attempt == attempt if update_id is None else ProposalRow.update_id == update_id
            row = session.scalars(select(ProposalRow).where(same)).first()
            if row is not None:
                return row
            _check_epoch(session, epoch)
            _check_live(session, expected_live)
            check_files(session, (clip, vlm))
            row = ProposalRow(
                kind=kind, family=family, clip=clip, vlm=vlm, actor=actor, reason=reason, state="pending",
                update_id=update_id, expected_live=expected_live, share=share, forced=forced,
            )  # fmt: skip
            row.attempt = attempt
            session.add(row)
            session.flush()
            detail = {"family": family, "clip": clip, "vlm": vlm, "reason": reason, **rollout_detail(share, forced)}
            note(session, actor, f"propose {kind}", f"proposal {row.id}", detail)
            tell_proposal(session, row)
            return row

        return write_once(self.database, write, "the proposal")

    def proposal(self, proposal_id: int) -> ProposalRow:
        with self.database.read() as session:
            return find_proposal(session, proposal_id)

    def proposals(self, limit: int = 50) -> list[ProposalRow]:
        return self._all(select(ProposalRow).order_by(ProposalRow.id.desc()).limit(limit))

    def pending_proposals(self) -> list[ProposalRow]:
        """Undecided proposals, oldest first; ``preparing`` ones were left by a killed controller."""
        query = select(ProposalRow).where(ProposalRow.state.not_in(ENDED)).order_by(ProposalRow.id)
        return self._all(query)

    def advance_proposal(
        self, proposal_id: int, state: ProposalState, error: str | None = None, *, epoch: int | None = None
    ) -> ProposalRow:
        """Move a proposal on. Only :meth:`ReleaseQueries.commit_release` sets ``committed``. Final states do not
        change: failing a failed proposal has no effect. Raises LeaseLost if a controller with a newer lease than
        ``epoch`` took over; ReleaseConflict if the proposal has ended."""
        if state == "committed":
            raise LedgerError("a proposal is committed with its release.", "Use commit_release.")

        def write(session: Session, repeated: bool) -> ProposalRow:
            _check_epoch(session, epoch)
            row = find_proposal(session, proposal_id, lock=True)
            if row.state == state and (repeated or state == "failed"):
                return row
            check_open(row)
            row.state, row.error = state, error
            if state == "failed":
                note(session, "controller", "proposal failed", f"proposal {row.id}", {"error": error})
            session.flush()
            tell_proposal(session, row)
            return row

        return write_once(self.database, write, f"that proposal {proposal_id} is {state}")


def find_proposal(session: Session, proposal_id: int, lock: bool = False) -> ProposalRow:
    """One proposal, locked until the transaction ends if ``lock``. Raises LedgerError."""
    row = session.get(ProposalRow, proposal_id, with_for_update=lock or None)
    if row is None:
        raise LedgerError(f"proposal {proposal_id} does not exist.", "See `ratchet releases list`.")
    return row


def check_open(row: ProposalRow) -> None:
    """Raise ReleaseConflict if a proposal has ended."""
    if row.state in ENDED:
        end = f" as release {row.release}" if row.state == "committed" else f" ({row.error})" if row.error else ""
        raise ReleaseConflict(
            f"proposal {row.id} is {row.state}{end}: another process has gone on with it.",
            "Look at `ratchet releases list` and decide again.",
        )


def rollout_detail(share: float, forced: bool) -> dict[str, Any]:
    return ({} if share >= 1 else {"share": share}) | ({"forced": True} if forced else {})


def _check_epoch(session: Session, epoch: int | None) -> None:
    if epoch is not None:
        check_lease(session, CONTROLLER_LEASE, epoch)


def _check_live(session: Session, expected: int | None) -> None:
    live = session.scalar(select(func.max(ReleaseRow.number))) or 0
    if expected is not None and expected != live:
        raise ReleaseConflict(
            f"release {live} is live, not {expected}: somebody released first.",
            "Look at `ratchet releases list` and decide again.",
        )
