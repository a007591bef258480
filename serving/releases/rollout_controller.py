"""Acts on the guard's findings: the one place where a release is taken back or a trial promoted without an operator.

It has no state. What is watched is in the ledger, what was seen is in the ingress processes, so a controller that was
killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from core import metrics
from core.errors import ReleaseConflict
from core.ledger.ledger import Ledger
from core.ledger.rows import Family
from core.settings.serving import Rollout
from serving.releases.commands import PromoteCommand, RollbackCommand
from serving.releases.guard import ACTOR, Evidence, GuardTarget, broken, find_guard_target, look, look_number
from serving.releases.observations import ComparisonCounts, Observations, together
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import ReleaseResult

log = logging.getLogger("ratchet.guard")
FAMILIES: tuple[Family, ...] = ("clip", "vlm")


class RolloutController:
    """Looks at the watched release: takes it back, promotes it, or lets it be."""

    def __init__(
        self,
        ledger: Ledger,
        protocol: ReleaseProtocol,
        settings: Rollout,
        observe: Callable[[], Awaitable[Sequence[Observations]]],
    ) -> None:
        self.ledger = ledger
        self.protocol = protocol
        self.settings = settings
        self._observe = observe
        self._last: dict[str, Any] = {"state": "idle"}
        self._looked = (0, 0)
        """Release, and number of its last look."""

    async def step(self) -> ReleaseResult | None:
        """One look, if it is time for one. Returns the release that it made.

        Raises:
            ReleaseError: the ingress does not answer, or what it decided cannot be released; it is tried again.
        """
        now = time.time()
        target = await asyncio.to_thread(find_guard_target, self.ledger, self.settings, now)
        if target is None:
            self._last = {"state": "idle"}
            metrics.rollout.watching(0, 1.0)
            return None
        number = look_number(now - target.began)
        if (target.release.number, number) == self._looked:
            return None  # what this look may spend is spent
        observations = together(target.release.number, await self._observe())
        self._looked = (target.release.number, number)
        evidence = look(self.settings, observations, target.incumbent.number, number)
        self._record(target, observations, evidence, now)
        try:
            if bad := broken(evidence):
                return await self._take_back(target, bad, observations, evidence)
            if await self._is_proven(target, observations, now):
                return await self._promote(target, observations, evidence)
        except ReleaseConflict:  # an operator was faster; the next look is at what they released
            log.info("release %d is not live any more", target.release.number)
        return None

    def status(self) -> dict[str, Any]:
        """What was seen at the last look."""
        return dict(self._last)

    async def _take_back(
        self, target: GuardTarget, bad: Sequence[Evidence], observations: Observations, evidence: Sequence[Evidence]
    ) -> ReleaseResult:
        number, back = target.release.number, target.incumbent.number
        reason = f"{_named(bad[0])} of release {number} is out of bounds: {bad[0].shown}"
        log.warning("release %d is taken back to release %d: %s", number, back, reason)
        names = [target.release.adapter(family) for family in FAMILIES if target.differs(family)]
        detail = {**_shown(observations, evidence), "back_to": back, "share": target.release.share}
        await asyncio.to_thread(
            lambda: self.ledger.withdraw(
                names, actor=ACTOR, subject=f"release {number}", reason=reason, evidence=detail
            )
        )
        outcome = await self.protocol.rollback(
            RollbackCommand(actor=ACTOR, reason=reason, expected_live=number, to=back, allow_withdrawn=True)
        )
        metrics.rollout.decided("rolled_back", bad[0].guardrail)
        return outcome

    async def _is_proven(self, target: GuardTarget, observations: Observations, now: float) -> bool:
        """Whether an update on trial may answer everybody. An operator's trial is the operator's to end."""
        if target.release.plain or target.kind != "update" or now - target.began < self.settings.observe_seconds:
            return False
        least = min(observations.compared.get(f, ComparisonCounts()).inputs for f in FAMILIES if target.differs(f))
        return least >= self.settings.min_comparisons and await asyncio.to_thread(self.ledger.held) is None

    async def _promote(
        self, target: GuardTarget, observations: Observations, evidence: Sequence[Evidence]
    ) -> ReleaseResult:
        number = target.release.number
        counts = ", ".join(one.shown for one in evidence if one.guardrail == "agreement")
        reason = f"release {number} stayed within bounds for {time.time() - target.began:.0f} s: {counts}"
        outcome = await self.protocol.promote(PromoteCommand(actor=ACTOR, reason=reason, expected_live=number))
        detail = {**_shown(observations, evidence), "promoted": number}
        await asyncio.to_thread(self.ledger.audit, ACTOR, "promote", f"release {outcome.number}", detail)
        metrics.rollout.decided("promoted", "none")
        return outcome

    def _record(
        self, target: GuardTarget, observations: Observations, evidence: Sequence[Evidence], now: float
    ) -> None:
        metrics.rollout.watching(target.release.number, target.release.share)
        for family, compared in observations.compared.items():
            if compared.inputs:
                metrics.rollout.agreement(family, compared.agreed / compared.inputs)
        share = target.release.share
        self._last = {
            "state": "guard" if target.release.plain else "canary" if share > 0 else "shadow",
            "release": target.release.number, "share": share, "incumbent": target.incumbent.number, "kind": target.kind,
            "seconds": round(now - target.began, 1),
            "seconds_left": round(target.until - now, 1) if target.release.plain else None,
            **_shown(observations, evidence),
        }  # fmt: skip


def _named(one: Evidence) -> str:
    return one.guardrail if one.family is None else f"{one.guardrail} ({one.family})"


def _shown(observations: Observations, evidence: Sequence[Evidence]) -> dict[str, Any]:
    """Counts and tests, as the audit log and the status show them."""
    return {
        "requests": {str(number): asdict(answered) for number, answered in observations.requests.items()},
        "compared": {family: asdict(compared) for family, compared in observations.compared.items()},
        "guardrails": [one.detail() for one in evidence],
    }
