"""What a rollback goes back to, whether it is resident, and a rollback while no server answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from core.digests import digest12
from core.errors import LedgerError, LedgerUnavailable, ReleaseConflict, ReleaseError
from core.ledger.collection import collected_error
from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from serving.releases.commands import RollbackCommand
from serving.releases.lineage import Lineage
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Adapters, Goal, scope_of

NAMES: Mapping[Family, str] = {"clip": "CLIP", "vlm": "VLM"}
ANSWER_SECONDS: Final = 0.7
"""For the ledger to say what is live, before a rollback: an operator must not wait for one that hangs."""


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """What the ledger says about a rollback that was ordered."""

    live: int
    """Number of the live release."""
    adapters: Adapters
    goal: Goal
    rows: ResidencyRows

    @property
    def is_resident(self) -> bool:
        """Whether replicas keep what it goes back to."""
        return self.goal["clip"] in self.rows.clips and self.goal["vlm"] in self.rows.vlms


@asynccontextmanager
async def ledger_answers() -> AsyncIterator[None]:
    """Bound what a rollback asks the ledger before it changes anything.

    Raises:
        LedgerUnavailable: it did not answer within :data:`ANSWER_SECONDS`.
    """
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            yield
    except TimeoutError:
        raise LedgerUnavailable(
            f"the ledger did not say within {ANSWER_SECONDS:g} s what is live; nothing was changed.",
            "What is in service goes on. Ask again when the database is back.",
        ) from None


def plan_rollback(
    ledger: Ledger, command: RollbackCommand, served: Sequence[Family], size: int, lineage: Lineage | None = None
) -> RollbackPlan:
    """What a command means at this moment; see :func:`rollback_target`.

    Args:
        served: families that there are replicas of.
        size: of the rollback window.
        lineage: the base of this server; only to its releases. None: there is only one.

    Raises:
        ReleaseConflict: something else is live by now.
        ReleaseError: there is nothing to go back to, or what is live has another base.
    """
    base = None if lineage is None else lineage.digest
    families = tuple(served) if command.family is None else (command.family,)
    with ledger.reading():
        live = ledger.live()
        if lineage is not None:
            lineage.check(live)
        adapters = rollback_target(ledger, families, command.to, command.allow_withdrawn, base)
        check_live(live, command.expected_live)
        goal = goal_of(adapters, ledger.stable())
        return RollbackPlan(live.number if live else 0, adapters, goal, read_residency(ledger, size, base))


def check_live(live: ReleaseRow | None, expected: int) -> None:
    """Raise ReleaseConflict when another release is live than the one that was decided upon."""
    number = live.number if live else 0
    if number != expected:
        raise ReleaseConflict(
            f"release {number} is live, not {expected}: somebody released first.",
            "Look at `ratchet releases list` and decide again.",
        )


def goal_of(adapters: Adapters, stable: ReleaseRow | None) -> Goal:
    """Both adapters of a release that sets some: the others are those of the newest plain release."""
    families: tuple[Family, ...] = ("clip", "vlm")
    return {family: adapters.get(family, stable.adapter(family) if stable else None) for family in families}


def rollback_target(
    ledger: Ledger,
    families: Sequence[Family],
    to: int | None,
    allow_withdrawn: bool = False,
    base: str | None = None,
) -> Adapters:
    """Adapters of release ``to``, or of the newest one that had another adapter in one of the families.

    Args:
        base: that of the live release (its digest): a rollback stays on it. None: there is only one.

    Raises:
        ReleaseError: there is none, it has another base, or what it had was withdrawn, collected, or never answered all
            requests.
    """
    live = ledger.live()
    if live is None:
        raise ReleaseError("nothing is live, so nothing can be rolled back.", "Wait for /health/ready.")
    try:
        release = _other(ledger, live, families, base) if to is None else ledger.release(to)
    except LedgerError as error:
        raise ReleaseError(error.message, error.fix) from None
    if base is not None and "clip" in families and release.clip_base not in (None, base):
        raise ReleaseError(
            f"release {release.number} has the base {digest12(str(release.clip_base))}, and release {live.number} "
            f"{digest12(base)}.",
            "The base is changed by `ratchet base switch NAME`.",
        )
    adapters: Adapters = {family: release.adapter(family) for family in families}
    if not allow_withdrawn:
        for name, why in ledger.withdrawn(list(adapters.values())).items():
            raise ReleaseError(
                f"{name} was withdrawn: {why}", "Go back to another release, or release it with --force."
            )
    for name, time in ledger.collected(list(adapters.values())).items():
        raise collected_error(name, time)
    if not release.plain:
        _refuse_trial(ledger, release, adapters)
    return adapters


def _refuse_trial(ledger: Ledger, release: ReleaseRow, adapters: Adapters) -> None:
    """A rollback answers all requests and is not watched: not with what was only tried."""
    for family, name in adapters.items():
        if not ledger.was_stable(family, name):
            kind = "canary" if release.share > 0 else "shadow"
            raise ReleaseError(
                f"release {release.number} was a {kind} that was never promoted: {name} never answered all requests.",
                f"Release it: `ratchet releases create {name}`, with --share or --shadow to try it again.",
            )


def _other(ledger: Ledger, live: ReleaseRow, families: Sequence[Family], base: str | None) -> ReleaseRow:
    stable = ledger.stable() or live
    if any(stable.adapter(family) != live.adapter(family) for family in families):
        return stable  # a canary or a shadow is taken back by what answers beside it
    older = [ledger.before(family, stable.adapter(family), base) for family in families]
    release = max((row for row in older if row is not None), key=lambda row: row.number, default=None)
    if release is None:
        kind = "another" if len(families) > 1 else f"another {NAMES[families[0]]}"
        raise ReleaseError(
            f"no release before {live.number} has {kind} adapter.", "Name one with `to`, or release an adapter."
        )
    return release


def roll_back_offline(
    ledger: Ledger,
    families: Sequence[Family],
    *,
    to: int | None,
    actor: str,
    reason: str,
    expected_live: int | None = None,
    hold_after_rollback: bool = False,
) -> ReleaseRow:
    """Release the adapters of an older release in the ledger alone, without asking a replica whether it can load them.
    Servers that run adopt it as they follow the ledger.

    Args:
        families: that are served, or the one that is meant.
        to: number of the release to go back to; None: the newest one that had another adapter.
        hold_after_rollback: see :attr:`core.settings.Rollout.hold_after_rollback`.

    Raises:
        ReleaseError: there is nothing to go back to.
        ReleaseConflict: something else is live by now.
    """
    live = ledger.live()
    if expected_live is not None:
        check_live(live, expected_live)
    adapters = rollback_target(ledger, families, to, base=live.clip_base if live else None)
    assert live is not None  # else there was no target
    goal = goal_of(adapters, ledger.stable() or live)
    proposal = ledger.propose(
        "rollback", family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"), actor=actor,
        reason=reason, expected_live=live.number,
    )  # fmt: skip
    try:
        row = ledger.commit_release(
            live.number + 1, clip=goal["clip"], vlm=goal["vlm"], actor=actor, reason=reason, proposal_id=proposal.id,
            hold_after_rollback=hold_after_rollback,
        )  # fmt: skip
    except ReleaseConflict as conflict:
        ledger.advance_proposal(proposal.id, "failed", str(conflict))
        raise
    ledger.audit(actor, "rolled back offline", f"release {row.number}", {"to": to, "families": list(families)})
    return row
