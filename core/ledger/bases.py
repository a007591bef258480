"""Queries of base upgrades: updates that begin at nothing on another base, and releases that change the base."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.errors import ReleaseConflict
from core.ledger import tables as t
from core.ledger.database import Database, as_row, write_once
from core.ledger.events import note
from core.ledger.releases import PLAIN, append_release, check_number
from core.ledger.rows import BaseUpgradeRow, ReleaseRow, UpdateRow


class BaseQueries:
    """What `ratchet base upgrade` and `ratchet base switch` write. Only CLIP bases change so far."""

    database: Database

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
        """Record an update that learns everything before ``data_to`` anew; the same id again returns what is there.

        Args:
            old, new: digest and name of both bases.
            gflops: its budget, in MAF-GFLOPs.
        """
        with self.database.write() as session:
            row = session.get(t.Update, update_id)
            if row is None:
                row = t.Update(
                    id=update_id, family="clip", state="training", recipe=recipe, seed=seed,
                    store_version=store_version, data_from={}, data_to=data_to, incumbent=incumbent,
                )  # fmt: skip
                session.add(row)
                session.flush()
                session.add(
                    t.BaseUpgrade(
                        update_id=update_id, old_base=old[0], old_name=old[1], new_base=new[0], new_name=new[1],
                        gflops=gflops, actor=actor,
                    )
                )  # fmt: skip
                detail = {"from": old[1], "to": new[1], "gflops": gflops}
                note(session, actor, "upgrade base", f"update {update_id}", detail)
            return as_row(UpdateRow, row)

    def base_upgrade(self, update_id: str) -> BaseUpgradeRow | None:
        """What an update goes from and to; None where it stays on its base."""
        with self.database.read() as session:
            row = session.get(t.BaseUpgrade, update_id)
            return None if row is None else as_row(BaseUpgradeRow, row)

    def approved_upgrade(self, new_base: str | None = None) -> BaseUpgradeRow | None:
        """The newest upgrade (to a base, by its digest) that passed the gate and was neither released nor cancelled.
        Its adapter is not withdrawn.
        """
        query = (
            select(t.BaseUpgrade)
            .join(t.Update, t.Update.id == t.BaseUpgrade.update_id)
            .join(t.Verdict, t.Verdict.update_id == t.BaseUpgrade.update_id)
            .join(t.Adapter, t.Adapter.name == t.Update.adapter)
            .where(t.Update.state == "done", t.Verdict.outcome == "passed", t.Adapter.withdrawn.is_(None))
            .where(t.Update.adapter.not_in(select(t.Release.clip).where(t.Release.clip.is_not(None))))
            .order_by(t.BaseUpgrade.created_at.desc())
            .limit(1)
        )
        if new_base is not None:
            query = query.where(t.BaseUpgrade.new_base == new_base)
        with self.database.read() as session:
            row = session.scalars(query).first()
            return None if row is None else as_row(BaseUpgradeRow, row)

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
        """Release an adapter of another base, with the VLM adapter that is live, in one transaction with its proposal:
        no controller of the old base finds that proposal open.

        Releases that name no base so far are of ``live_base``: that is written down, too.

        Args:
            live: what has to be live now, and plain.
            update_id: the upgrade that made the adapter.
            rollback: it goes back to an earlier release's adapter.

        Raises:
            ReleaseConflict: something else is live by now.
        """
        attempt = secrets.token_hex(16)

        def write(session: Session, _repeated: bool) -> ReleaseRow:
            written = session.scalars(select(t.Release).where(t.Release.attempt == attempt)).first()
            if written is not None:
                return as_row(ReleaseRow, written)
            number = live.number + 1
            check_number(session, number)
            if not live.plain:
                raise ReleaseConflict(
                    f"release {live.number} is on trial.", "Promote it or take it back before the base changes."
                )
            unknown = update(t.Release).where(t.Release.clip_base.is_(None))
            session.execute(unknown.values(clip_base=live_base))
            proposal = t.Proposal(
                kind="rollback" if rollback else "release", family="clip", clip=clip, vlm=None, actor=actor,
                reason=reason, state="preparing", update_id=update_id, expected_live=live.number, attempt=attempt,
            )  # fmt: skip
            session.add(proposal)
            session.flush()
            row = t.Release(
                number=number, clip=clip, vlm=live.vlm, actor=actor, reason=reason, proposal_id=proposal.id,
                attempt=attempt, clip_base=base, share=PLAIN,
            )  # fmt: skip
            append_release(session, row, proposal)
            detail = {"from": live_base, "to": base, "clip": clip, "rollback": rollback}
            note(session, actor, "change base", f"release {number}", detail)
            return as_row(ReleaseRow, row)

        return write_once(self.database, write, f"release {live.number + 1}")

    def newest_of_each_base(self) -> list[ReleaseRow]:
        """The newest plain release of each base that was ever live, newest first."""
        numbers = (
            select(func.max(t.Release.number))
            .where(t.Release.share >= PLAIN, t.Release.clip_base.is_not(None))
            .group_by(t.Release.clip_base)
        )
        query = select(t.Release).where(t.Release.number.in_(numbers)).order_by(t.Release.number.desc())
        with self.database.read() as session:
            return [as_row(ReleaseRow, row) for row in session.scalars(query)]

    def image_spaces_of_bases(self) -> set[str]:
        """Image spaces of :meth:`newest_of_each_base`: what another base's servers search, or will after a switch
        back. That of a base alone is not known to the ledger.
        """
        clips = [row.clip for row in self.newest_of_each_base() if row.clip is not None]
        with self.database.read() as session:
            return set(session.scalars(select(t.Adapter.image_space).where(t.Adapter.name.in_(clips))))
