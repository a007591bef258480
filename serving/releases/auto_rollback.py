"""Automatic changes: the guard rolls back a release that is out of bounds and promotes an update that stayed within
them; the fallback rolls back a live adapter that no replica can load. All that matters is in the ledger and in the
ingress processes, so a restarted controller continues."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from core import metrics
from core.errors import RatchetError, ReleaseConflict, ReleaseError
from core.ledger.rows import Family, ReleaseRow
from core.settings.serving import Rollout
from serving.releases.feedback_guard import feedback_evidence
from serving.releases.guard import (
    ACTOR,
    ComparisonCounts,
    Evidence,
    GuardTarget,
    Observations,
    broken,
    find_guard_target,
    look,
    look_number,
    together,
)
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import FAMILIES, PromoteCommand, ReleaseResult, RollbackCommand

log = logging.getLogger("ratchet.guard")
CHECK_SECONDS: Final = 2.0
REPORTS_SECONDS: Final = 60.0
"""Interval at which the guard counts what callers report: of a million reports, in half a second."""
ANSWER_SECONDS: Final = 30.0
"""Time for all replicas to say whether they hold an adapter; the next check asks again."""
MAX_RELEASES: Final = 50
"""Releases among which a loadable one is searched."""


class Guard:
    """Rolls back or promotes the watched release, or leaves it."""

    def __init__(self, protocol: ReleaseProtocol, settings: Rollout) -> None:
        self.ledger = protocol.ledger
        self.protocol = protocol
        self.settings = settings
        self._last: dict[str, Any] = {"state": "idle"}
        self._reports_due = 0.0
        self._looked = (0, 0)
        """Release, and number of its last look."""

    async def step(self) -> ReleaseResult | None:
        """Take one look if it is due. Returns the release that it made. Raises ReleaseError, to be tried again, when
        the ingress does not answer or the decision cannot be released."""
        now = time.time()
        if (taken_back := await self._reported()) is not None:
            return taken_back
        target = await asyncio.to_thread(find_guard_target, self.ledger, self.settings, now)
        if target is None:
            self._last = {"state": "idle"}
            metrics.rollout.watching(0, 1.0)
            return None
        number = look_number(now - target.began)
        if (target.release.number, number) == self._looked:
            return None  # this look was already taken
        observations = together(target.release.number, await self.protocol.broadcast.observations())
        self._looked = (target.release.number, number)
        evidence = look(self.settings, observations, target.incumbent.number, number)
        counted = {
            "requests": {str(each): asdict(answered) for each, answered in observations.requests.items()},
            "compared": {family: asdict(compared) for family, compared in observations.compared.items()},
            "guardrails": [one.detail() for one in evidence],
        }
        self._record(target, observations, counted, now)
        try:
            if bad := broken(evidence):
                return await self._take_back(target, bad[0], counted)
            if await self._is_proven(target, observations, now):
                return await self._promote(target, evidence, counted, now)
        except ReleaseConflict:  # an operator was faster; the next look is at their release
            log.info("release %d is not live any more", target.release.number)
        return None

    async def _reported(self) -> ReleaseResult | None:
        """Take back a release whose answers are reported as wrong more often, however old it is."""
        if self.settings.guard_seconds <= 0 or time.monotonic() < self._reports_due:
            return None
        self._reports_due = time.monotonic() + REPORTS_SECONDS
        target = await asyncio.to_thread(find_guard_target, self.ledger, self.settings, 0.0)
        if target is None:
            return None
        evidence = await asyncio.to_thread(feedback_evidence, self.ledger, target)
        if bad := broken(evidence):
            with suppress(ReleaseConflict):  # an operator was faster
                return await self._take_back(target, bad[0], {"guardrails": [one.detail() for one in evidence]})
        return None

    def status(self) -> dict[str, Any]:
        return dict(self._last)

    async def _take_back(self, target: GuardTarget, bad: Evidence, counted: dict[str, Any]) -> ReleaseResult:
        number, back = target.release.number, target.incumbent.number
        named = bad.guardrail if bad.family is None else f"{bad.guardrail} ({bad.family})"
        reason = f"{named} of release {number} is out of bounds: {bad.shown}"
        log.warning("release %d is taken back to release %d: %s", number, back, reason)
        names = [target.release.adapter(family) for family in FAMILIES if target.differs(family)]
        detail = {**counted, "back_to": back, "share": target.release.share}
        await asyncio.to_thread(
            lambda: self.ledger.withdraw(
                names, actor=ACTOR, subject=f"release {number}", reason=reason, evidence=detail
            )
        )
        outcome = await self.protocol.rollback(
            RollbackCommand(actor=ACTOR, reason=reason, expected_live=number, to=back, allow_withdrawn=True)
        )
        metrics.rollout.decided("rolled_back", bad.guardrail)
        return outcome

    async def _is_proven(self, target: GuardTarget, observations: Observations, now: float) -> bool:
        """True if an update on trial may answer all requests. Operators end their own trials."""
        if target.release.plain or target.kind != "update" or now - target.began < self.settings.observe_seconds:
            return False
        least = min(observations.compared.get(f, ComparisonCounts()).inputs for f in FAMILIES if target.differs(f))
        return least >= self.settings.min_comparisons and await asyncio.to_thread(self.ledger.held) is None

    async def _promote(
        self, target: GuardTarget, evidence: Sequence[Evidence], counted: dict[str, Any], now: float
    ) -> ReleaseResult:
        number = target.release.number
        counts = ", ".join(one.shown for one in evidence if one.guardrail == "agreement")
        reason = f"release {number} stayed within bounds for {now - target.began:.0f} s: {counts}"
        outcome = await self.protocol.promote(PromoteCommand(actor=ACTOR, reason=reason, expected_live=number))
        detail = {**counted, "promoted": number}
        await asyncio.to_thread(self.ledger.audit, ACTOR, "promote", f"release {outcome.number}", detail)
        metrics.rollout.decided("promoted", "none")
        return outcome

    def _record(self, target: GuardTarget, observations: Observations, counted: dict[str, Any], now: float) -> None:
        release, share = target.release, target.release.share
        metrics.rollout.watching(release.number, share)
        for family, compared in observations.compared.items():
            if compared.inputs:
                metrics.rollout.agreement(family, compared.agreed / compared.inputs)
        self._last = {
            "state": "guard" if release.plain else "canary" if share > 0 else "shadow",
            "release": release.number, "share": share, "incumbent": target.incumbent.number, "kind": target.kind,
            "seconds": round(now - target.began, 1),
            "seconds_left": round(target.until - now, 1) if release.plain else None,
            **counted,
        }  # fmt: skip


class Fallback:
    """Asks all replicas for the live adapters. If one's files are gone or damaged everywhere, rolls back in the ledger
    (as actor ``ratchet``) to the newest loadable release. Until then the ingress answers with that release, and the
    alert RatchetAdapterUnservable fires."""

    def __init__(self, protocol: ReleaseProtocol) -> None:
        self._ledger = protocol.ledger
        self._protocol = protocol
        self._due = 0.0
        self.problem = ""
        """Reason that an older release than the ledger's answers; empty when none does."""

    async def step(self) -> ReleaseResult | None:
        """Check every :data:`CHECK_SECONDS`. Returns the release that was made. Raises RatchetError when the ledger
        cannot be written, or nothing older can be loaded either."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + CHECK_SECONDS
        live = await asyncio.to_thread(self._ledger.live)
        if live is None:
            return None
        for family in FAMILIES if self._protocol.broadcast.has_vlm else FAMILIES[:1]:
            reason = await self._reason(family, live.adapter(family))
            metrics.release.unservable(family, bool(reason))
            if not reason:
                continue
            self.problem = f"{live.adapter(family)} cannot be loaded: {reason}"
            log.error("%s", self.problem)
            target = await self._target(live, family)
            outcome = await self._protocol.rollback(
                RollbackCommand(
                    actor="ratchet", reason=self.problem[:500], expected_live=live.number, to=target, family=family
                )
            )
            metrics.release.unservable(family, False)
            self.problem, self._due = "", 0.0  # the other family may be gone, too
            return outcome
        self.problem = ""
        return None

    async def _target(self, live: ReleaseRow, family: Family) -> int:
        """The newest older release that a rollback may go to and some replica can load."""
        releases = await asyncio.to_thread(self._ledger.releases, MAX_RELEASES, live.clip_base)
        names = [row.adapter(family) for row in releases]
        rejected = {
            live.adapter(family),
            *await asyncio.to_thread(self._ledger.withdrawn, names),
            *await asyncio.to_thread(self._ledger.collected, names),
        }
        for row in releases:
            adapter = row.adapter(family)
            if row.number >= live.number or not row.plain or adapter in rejected:
                continue
            if not await self._reason(family, adapter):
                return row.number
            rejected.add(adapter)
        raise ReleaseError(f"{self.problem} No older release can be loaded either.", "Restore the artifacts.")

    async def _reason(self, family: Family, adapter: str | None) -> str:
        """Reason that no replica can load an adapter; empty when one can, or when this is unknown now."""
        if adapter is None:
            return ""
        broadcast = self._protocol.broadcast
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answers = await (broadcast.prepare if family == "clip" else broadcast.prepare_vlm)(adapter)
        except (TimeoutError, RatchetError):
            return ""
        return answers[0].error if answers and all(answer.unservable for answer in answers) else ""
