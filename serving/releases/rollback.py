"""Rollbacks: choosing the release to go back to, and writing it, with a running server or without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from core.digests import digest12
from core.errors import LedgerError, LedgerUnavailable, RatchetError, ReleaseError
from core.ledger import Ledger
from core.ledger.collection import collected_error
from core.ledger.rows import Family, ProposalRow, ReleaseRow
from serving.releases.leadership import Lineage
from serving.releases.types import Adapters, RollbackCommand, TargetAdapters, scope_of, target_adapters

NAMES: Mapping[Family, str] = {"clip": "CLIP", "vlm": "VLM"}
ANSWER_SECONDS: Final = 0.7
"""For the ledger to answer before a rollback: operators must not wait for a ledger that hangs."""


@asynccontextmanager
async def ledger_answers() -> AsyncIterator[None]:
    """Bound the ledger calls before a rollback. Raises LedgerUnavailable after :data:`ANSWER_SECONDS`."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            yield
    except TimeoutError:
        raise LedgerUnavailable(
            f"the ledger did not say within {ANSWER_SECONDS:g} s what is live; nothing was changed.",
            "What is in service goes on. Ask again when the database is back.",
        ) from None


def plan_rollback(
    ledger: Ledger, command: RollbackCommand, served: Sequence[Family], lineage: Lineage | None = None
) -> tuple[Adapters, TargetAdapters]:
    """The adapters that a command sets (see :func:`rollback_target`), and those of the new release. ``served``:
    families that have replicas. ``lineage``: the server's base; None: only the ledger is changed. Raises
    ReleaseConflict when something else is live by now; ReleaseError when there is nothing to go back to, or what is
    live has another base."""
    families = tuple(served) if command.family is None else (command.family,)
    with ledger.reading():
        live = ledger.live()
        if lineage is not None:
            lineage.check(live)
        adapters = rollback_target(ledger, families, command.to, command.allow_withdrawn)
        return adapters, target_adapters(adapters, ledger.stable())


def rollback_target(
    ledger: Ledger, families: Sequence[Family], to: int | None, allow_withdrawn: bool = False
) -> Adapters:
    """Adapters of release ``to``, or of the newest one with another adapter in one of the families. The base stays that
    of the live release. Raises ReleaseError when there is none, it has another base, or an adapter was withdrawn,
    collected, or never answered all requests."""
    live = ledger.live()
    if live is None:
        raise ReleaseError("nothing is live, so nothing can be rolled back.", "Wait for /health/ready.")
    try:
        release = _other(ledger, live, families) if to is None else ledger.release(to)
    except LedgerError as error:
        raise ReleaseError(error.message, error.fix) from None
    if live.clip_base is not None and "clip" in families and release.clip_base not in (None, live.clip_base):
        raise ReleaseError(
            f"release {release.number} has the base {digest12(str(release.clip_base))}, and release {live.number} "
            f"{digest12(live.clip_base)}.",
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
    if not release.plain:  # rollbacks are not watched: no adapters that were only tried
        for family, adapter in adapters.items():
            if not ledger.was_stable(family, adapter):
                kind = "canary" if release.share > 0 else "shadow"
                raise ReleaseError(
                    f"release {release.number} was a {kind} that was never promoted: {adapter} never answered all "
                    "requests.",
                    f"Release it: `ratchet releases create {adapter}`, with --share or --shadow to try it again.",
                )
    return adapters


def _other(ledger: Ledger, live: ReleaseRow, families: Sequence[Family]) -> ReleaseRow:
    stable = ledger.stable() or live
    if any(stable.adapter(family) != live.adapter(family) for family in families):
        return stable  # a canary or shadow goes back to the stable release next to it
    older = [ledger.before(family, stable.adapter(family), live.clip_base) for family in families]
    release = max((row for row in older if row is not None), key=lambda row: row.number, default=None)
    if release is None:
        kind = "another" if len(families) > 1 else f"another {NAMES[families[0]]}"
        raise ReleaseError(
            f"no release before {live.number} has {kind} adapter.", "Name one with `to`, or release an adapter."
        )
    return release


def commit_rollback(
    ledger: Ledger,
    command: RollbackCommand,
    adapters: Adapters,
    target: TargetAdapters,
    hold_after_rollback: bool,
    fail: Callable[[ProposalRow, str], object],
) -> ProposalRow:
    """Write a rollback that needs no preparation: its proposal and its release. Needs no lease, because the ledger
    checks that the expected release is still live. ``fail``: records the reason of a failure. Raises ReleaseConflict
    when something else is live by now, LedgerUnavailable."""
    proposal = ledger.propose(
        "rollback", family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"),
        actor=command.actor, reason=command.reason, expected_live=command.expected_live,
    )  # fmt: skip
    try:
        ledger.commit_release(
            command.expected_live + 1, clip=target["clip"], vlm=target["vlm"], actor=command.actor,
            reason=command.reason, proposal_id=proposal.id, hold_after_rollback=hold_after_rollback,
        )  # fmt: skip
    except RatchetError as error:
        fail(proposal, str(error))
        raise
    return proposal


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
    """Roll back in the ledger alone, without asking whether replicas can load the adapters. Running servers follow the
    ledger. ``families``: those that are served, or the one to roll back. ``to``: number of the release; None: the
    newest one with another adapter. Raises ReleaseError when there is nothing to go back to, ReleaseConflict when
    something else is live by now."""
    live = ledger.live()
    expected = expected_live if expected_live is not None else live.number if live else 0
    command = RollbackCommand(actor=actor, reason=reason, expected_live=expected, to=to)
    adapters, target = plan_rollback(ledger, command, families)
    commit_rollback(
        ledger, command, adapters, target, hold_after_rollback,
        fail=lambda proposal, why: ledger.advance_proposal(proposal.id, "failed", why),
    )  # fmt: skip
    row = ledger.release(expected + 1)
    ledger.audit(actor, "rolled back offline", f"release {row.number}", {"to": to, "families": list(families)})
    return row
