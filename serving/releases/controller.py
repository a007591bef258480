"""The release controller: a Ray shell around :class:`serving.releases.protocol.ReleaseProtocol`. Of several servers on
one ledger, only the controller with the lease carries proposals out and runs the guard; all can roll back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from core import metrics
from core.errors import LeaseLost, LedgerError, LedgerUnavailable, RatchetError, ReleaseError
from core.ledger import Family, Ledger
from core.settings import Settings
from serving.ray.replica_process import begin_replica, freeze_gc, keep_running
from serving.releases.auto_rollback import Fallback, Guard
from serving.releases.broadcast import Broadcast
from serving.releases.leadership import RENEW_SECONDS, ControllerLease, Lineage
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import (
    FAMILIES,
    HoldCommand,
    HoldingCommand,
    LiveCommand,
    PromoteCommand,
    ReleaseCommand,
    ReleaseResult,
    RollbackCommand,
)

log = logging.getLogger("ratchet.controller")
POLL_SECONDS = 1.0
START_SECONDS = 10.0
"""Longest wait of an operator's call for a controller that starts."""
GUARD_PAUSE_SECONDS = 5.0
"""Extra pause after a failed look: the guard will hardly succeed a second later."""
KINDS = {"release": "release", "promote": "promotion", "rollback": "rollback"}
Result = TypeVar("Result")


class ReleaseController:
    """Runs proposals. A release continues when the operator who requested it disconnects."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        catalog: DeploymentHandle,
        vlm: DeploymentHandle | None = None,
    ) -> None:
        begin_replica(settings, "controller")
        self.ledger = Ledger.lazy(settings.ledger)
        self.broadcast = Broadcast(encoder, catalog, vlm)
        rollout = settings.rollout
        share = {"direct": 1.0, "canary": rollout.share, "shadow": 0.0}[rollout.mode]
        self.lease = ControllerLease(self.ledger)
        self.lineage = Lineage.of(settings)
        self.protocol = ReleaseProtocol(
            self.ledger, self.broadcast, settings.serve.rollback_window, update_share=share,
            hold_after_rollback=rollout.hold_after_rollback, lease=self.lease, lineage=self.lineage,
            indexes=rollout.indexes,
        )  # fmt: skip
        self.guard = Guard(self.protocol, rollout)
        self.fallback = Fallback(self.protocol)
        self._started = asyncio.Event()
        self._last_error = ""
        self._seen = 0
        """The newest release that this server's replicas were told of."""
        self._to_retire = asyncio.Event()
        self._status: asyncio.Task[dict[str, Any]] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._loops: dict[str, asyncio.Task[None]] = {}
        freeze_gc()

    def __del__(self) -> None:
        """Serve calls this when the replica ends."""
        if (lease := getattr(self, "lease", None)) is not None:
            lease.give_back()

    async def check_health(self) -> None:
        """Keep the loops running. Guard and lease have their own, because preparing a release may take minutes."""
        loops: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "lease": self._keep_lease, "proposals": self._run, "retire": self._retire,
            "guard": partial(self._watch, "guard", self.guard.step, GUARD_PAUSE_SECONDS),
            "fallback": partial(self._watch, "fallback", self.fallback.step),
        }  # fmt: skip
        keep_running(self._loops, loops)

    async def change(self, command: LiveCommand) -> ReleaseResult | RatchetError:
        """Carry out a release, promotion or rollback. Expected errors are returned, because a raised one means a dead
        replica. Adapters that passed no gate and were never live need ``force``."""
        return await asyncio.shield(self._spawn(self._change(command)))

    async def _change(self, command: LiveCommand) -> ReleaseResult | RatchetError:
        if not isinstance(command, RollbackCommand):  # which does not need started replicas
            try:
                async with asyncio.timeout(START_SECONDS):
                    await self._started.wait()
            except TimeoutError:
                return ReleaseError(
                    f"the release controller has not started yet: {self._last_error or 'replicas are starting'}.",
                    "Try again shortly, or use `ratchet releases rollback --offline`.",
                )
        try:
            match command:
                case ReleaseCommand():
                    unproven = await asyncio.to_thread(self._check_adapters, command)
                    outcome = await self.protocol.release(command, forced=unproven)
                case PromoteCommand():
                    outcome = await self.protocol.promote(command)
                case RollbackCommand():
                    outcome = await self.protocol.rollback(command)
        except RatchetError as error:
            self._step_down_if(error)
            metrics.release.decided(KINDS[command.action], "failed")
            self._to_retire.set()  # unload what the failed proposal loaded
            return error
        self._recorded(outcome)
        return outcome

    def _check_adapters(self, command: ReleaseCommand) -> bool:
        """True if an adapter passed no gate and was never live. Raises ReleaseError unless that is forced."""
        unproven: list[str] = []
        for family, name in command.adapters.items():
            if name is None:
                continue
            try:
                row = self.ledger.adapter(name)
            except LedgerError as error:
                raise ReleaseError(error.message, "See `ratchet releases list` for adapters that exist.") from None
            if row.family != family:
                raise ReleaseError(f"{name} is no {family} adapter.", f"Release it as `{row.family}`.")
            if why := self.ledger.unproven(name):
                unproven.append(why)
        if unproven and not command.force:
            raise ReleaseError(
                f"{'; '.join(unproven)}.",
                'Judge it with `ratchet gate run`; if you are sure, say --force (HTTP: "force": true).',
            )
        return bool(unproven)

    async def hold(self, command: HoldingCommand) -> RatchetError | None:
        write = self.ledger.hold if isinstance(command, HoldCommand) else self.ledger.resume
        try:
            await asyncio.to_thread(write, command.actor, command.reason)
        except RatchetError as error:
            return error
        return None

    async def status(self) -> dict[str, Any]:
        """Resident releases, requests in flight, replicas, hold. Concurrent callers share one reading."""
        if self._status is None or self._status.done():
            self._status = self._spawn(self._read_status())
        return await asyncio.shield(self._status)

    async def _read_status(self) -> dict[str, Any]:
        held = await asyncio.to_thread(self.ledger.held)
        residency = await self.protocol.known_residency()
        flight = await self.broadcast.in_flight() if self._started.is_set() else {}
        encoders, vlms = await asyncio.gather(self.broadcast.encoder_status(), self.broadcast.vlm_status())
        return {
            "started": self._started.is_set(),
            "trouble": self._last_error,
            "epoch": self.lease.epoch,
            "fallback": self.fallback.problem,
            "held": None if held is None else {"actor": held.actor, "reason": held.reason},
            "resident": [
                {"release": s.release, "adapter": s.adapter, "image_space": s.image_space, "text_space": s.text_space,
                 "vlm": s.vlm_adapter, "share": s.share}
                for s in residency.window
            ],
            "rollout": self.guard.status(),
            "waits_for": self.protocol.preparation.waits_for,
            "replicas": await self.broadcast.replica_states(),
            "encoders": encoders,
            "vlm": vlms,
            "in_flight": {str(number): count for number, count in flight.items()},
        }  # fmt: skip

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)  # the loop holds tasks weakly
        task.add_done_callback(self._running.discard)
        return task

    def _step_down_if(self, error: RatchetError) -> None:
        if isinstance(error, LeaseLost):  # a write was refused: another process has taken over
            self.lease.epoch = None

    def _recorded(self, outcome: ReleaseResult) -> None:
        self._seen = max(self._seen, outcome.number)
        metrics.release.decided(outcome.kind, "committed")
        metrics.release.phase("prepare", outcome.prepare_seconds)
        metrics.release.phase("commit", outcome.commit_seconds)
        if outcome.kind == "rollback":
            metrics.release.phase("rollback", outcome.prepare_seconds + outcome.commit_seconds)
        log.info("release %d is live: %s", outcome.number, outcome)
        self._to_retire.set()
        self._spawn(self._tell(outcome))

    async def _tell(self, outcome: ReleaseResult) -> None:
        await self._tell_of_live()
        subject = f"release {outcome.number}"
        await asyncio.to_thread(self.ledger.audit, "controller", "released", subject, asdict(outcome))

    async def _tell_of_live(self) -> None:
        await asyncio.to_thread(tell_of_live, self.ledger, FAMILIES if self.broadcast.has_vlm else FAMILIES[:1])

    async def _retire(self) -> None:
        """Retire releases one at a time, because each waits for requests in flight. Meanwhile calls are merged into
        one."""
        while True:
            await self._to_retire.wait()
            self._to_retire.clear()
            try:
                await self.protocol.retire()
            except RatchetError as error:
                log.warning("retire: %s", error)

    async def _keep_lease(self) -> None:
        while True:
            try:
                if await self._other_base():
                    await asyncio.to_thread(self.lease.give_back)  # for a server that can load the live release
                else:
                    await self.lease.keep()
            except RatchetError as error:
                log.warning("lease: %s", error)
            except Exception:
                log.exception("lease")
            await asyncio.sleep(RENEW_SECONDS)

    async def _other_base(self) -> str:
        """Reason that this server cannot answer with the live release; empty if it has the same base."""
        if self.lineage is None:
            return ""
        live = await asyncio.to_thread(self.ledger.live)
        return "" if live is None or self.lineage.has(live) else self.lineage.why_not(live)

    async def _watch(
        self, name: str, step: Callable[[], Awaitable[ReleaseResult | None]], pause_seconds: float = 0.0
    ) -> None:
        """Take steps while this controller leads, with ``pause_seconds`` extra after a failure."""
        await self._started.wait()
        while True:
            try:
                leads = self.lease.epoch is not None and not await self._other_base()
                if leads and (outcome := await step()) is not None:
                    self._recorded(outcome)
            except RatchetError as error:
                log.warning("%s: %s", name, error)
                self._step_down_if(error)
                await asyncio.sleep(pause_seconds)
            except Exception:
                log.exception(name)
            await asyncio.sleep(POLL_SECONDS)

    async def _run(self) -> None:
        """Start, then follow the releases of other controllers, and carry proposals out while this one leads."""
        while True:
            try:
                starting = not self._started.is_set()
                outcome = await self.protocol.start() if starting else None
                self._started.set()
                if outcome is None:
                    await self._follow(announced=starting)
                other_base = await self._other_base()
                if outcome is None and self.lease.epoch is not None and not other_base:
                    outcome = await self.protocol.step()
                self._last_error = other_base
                metrics.release.other_base(bool(other_base))
                if outcome is not None:
                    self._recorded(outcome)
                    continue
            except LeaseLost as error:
                log.info("proposal: %s", error)
                self._step_down_if(error)
            except RatchetError as error:
                log.warning("proposal: %s", error)
                self._last_error = str(error)
                if not isinstance(error, LedgerUnavailable):
                    metrics.release.decided("update", "failed")
                    self._to_retire.set()
            except Exception as error:
                log.exception("controller")
                self._last_error = f"{type(error).__name__}: {error}"[:300]
            await asyncio.sleep(POLL_SECONDS)

    async def _follow(self, announced: bool) -> None:
        """Tell this server's replicas what another server's controller has released."""
        live = await asyncio.to_thread(self.ledger.live)
        if live is None or live.number <= self._seen:
            return
        self._seen = live.number
        if not announced:
            await self.protocol.follow()
        await self._tell_of_live()
        self._to_retire.set()


def tell_of_live(ledger: Ledger, families: Sequence[Family]) -> None:
    """Export which release is live, since when, and what its adapters gained and forgot."""
    live = ledger.live()
    if live is None:
        return
    metrics.release.live("controller", live.number)
    metrics.release.committed(live.created_at.timestamp())
    for family in families:
        adapter = live.adapter(family)
        verdict = None if adapter is None else ledger.verdict_on(adapter)
        unknown = 0.0 if adapter is None else math.nan  # gains are relative to the base
        gain, forgetting = (unknown, unknown) if verdict is None else (verdict.gain, verdict.forgetting)
        metrics.release.learned(family, gain, forgetting)


def outcome_of(result: Result | RatchetError) -> Result:
    """Return the value, or raise a returned error."""
    if isinstance(result, RatchetError):
        raise result
    return result
