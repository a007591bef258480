"""The release protocol: propose, prepare, commit, announce, retire. No Ray here.

A release names a CLIP adapter and a VLM adapter. A proposal sets one of them or both; what it does not set stays what
is live at the moment of the commit, and is neither prepared nor touched. Beside a canary or a shadow that is what the
newest plain release has: whatever is released next ends the trial, and only a promotion takes over what was tried.

What is live changes at one point only, the ledger row of ``commit``. Before it, nothing that clients see has changed,
so a failure costs nothing; after it, every later step may be repeated by whoever comes next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from ops import metrics
from ops.errors import RatchetError, ReleaseConflict, ReleaseError
from ops.ledger.ledger import Ledger
from ops.ledger.rows import Family, ProposalKind, ProposalRow, ReleaseRow, Scope
from serving.releases.commands import LiveCommand, PromoteCommand, ReleaseCommand, RollbackCommand
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.residency import read_residency, resolve_residency
from serving.releases.rollback import rollback_target
from serving.releases.types import (
    NO_VLM,
    Adapters,
    Broadcast,
    Outcome,
    Prepared,
    Residency,
    proposed_adapters,
    scope_of,
)


class Postponed(Exception):
    """A proposal gave way to a rollback of the other family; it waits for its turn again."""


@dataclass
class _Work:
    """The proposal that is being prepared, and who stopped it."""

    proposal: ProposalRow
    task: asyncio.Task[None]
    stopped_by: str = ""
    stopped_for: Scope = "both"


class ReleaseProtocol:
    """Runs proposals one at a time, called from one event loop; the ledger guards against other processes."""

    def __init__(self, ledger: Ledger, broadcast: Broadcast, window: int, update_share: float = 1.0) -> None:
        """``update_share``: of the requests, for updates that passed the gate; see :attr:`ReleaseRow.share`."""
        self.update_share = update_share
        self.ledger = ledger
        self.broadcast = broadcast
        self.size = window
        self._turn = asyncio.Lock()
        self._spaces: dict[str | None, tuple[str, str]] = {}
        self._work: _Work | None = None

    async def start(self) -> Outcome | None:
        """Continue from the ledger: make release 1 (the bases alone) if there is none, else announce what is live."""
        async with self._turn:
            if await asyncio.to_thread(self.ledger.live) is None:
                waiting = await asyncio.to_thread(self.ledger.pending_proposals)
                initial = [proposal for proposal in waiting if proposal.kind == "initial"]
                return await self._run(initial[0] if initial else await asyncio.to_thread(self._propose_initial))
            residency = await self.residency()
            await asyncio.gather(*(self.broadcast.cover(snapshot, wait=False) for snapshot in residency.indexed))
            await self._announce()
            return None

    async def step(self) -> Outcome | None:
        """Run the oldest waiting proposal, if one may run: an update's waits while updates are on hold, and while
        another one is on trial as a canary or a shadow.
        """
        async with self._turn:
            held = await asyncio.to_thread(self.ledger.held)
            live = await asyncio.to_thread(self.ledger.live)
            if live is not None:
                metrics.release.live("controller", live.number)  # also one that was made offline
            waits = held is not None or (live is not None and not live.plain)
            waiting = await asyncio.to_thread(self.ledger.pending_proposals)
            metrics.release.waiting(len(waiting), held is not None)
            for proposal in waiting:
                if proposal.kind == "update" and waits:
                    continue
                try:
                    return await self._run(proposal)
                except Postponed:
                    return None
            return None

    async def release(self, command: ReleaseCommand, forced: bool = False) -> Outcome:
        """Release adapters for an operator. ``forced``: an adapter among them passed no gate and was never live.

        Raises:
            ReleaseConflict: something else is live by now.
            ReleaseError: an adapter cannot be served; what was live stays live.
        """
        if not command.adapters:
            raise ReleaseError("no adapter is named.", "Name a CLIP adapter, a VLM adapter, or both.")
        return await self._ordered("release", command.adapters, command, command.share, forced)

    async def promote(self, command: PromoteCommand) -> Outcome:
        """A plain release of what is on trial. It is loaded everywhere, so this is a commit without a preparation.

        Raises:
            ReleaseError: nothing is on trial.
            ReleaseConflict: something else is live by now.
        """
        live = await asyncio.to_thread(self.ledger.live)
        if live is None or live.plain:
            raise ReleaseError(
                "no canary and no shadow is live, so nothing can be promoted.",
                "Start one: `ratchet releases release --share 0.1` or `--shadow`.",
            )
        both: Adapters = {"clip": live.clip, "vlm": live.vlm} if self.broadcast.has_vlm else {"clip": live.clip}
        return await self._ordered("promotion", both, command)

    async def rollback(self, command: RollbackCommand) -> Outcome:
        """A new release with the adapters of an older one.

        It does not queue behind a proposal that is being prepared, which may take minutes: that one is stopped. It
        fails, because it was judged against what is being taken back; an update of the other family waits instead.

        Raises:
            ReleaseError: there is nothing to roll back to.
            ReleaseConflict: something else is live by now.
        """
        served: tuple[Family, ...] = ("clip", "vlm") if self.broadcast.has_vlm else ("clip",)
        families = served if command.family is None else (command.family,)
        adapters = await asyncio.to_thread(rollback_target, self.ledger, families, command.to)
        if self._work is not None:
            self._work.stopped_by = f"{command.actor} rolled back while it was being prepared"
            self._work.stopped_for = scope_of(adapters)
            self._work.task.cancel()
        return await self._ordered("rollback", adapters, command)

    async def residency(self) -> Residency:
        """What stays loaded. Spaces come from the encoders and are remembered. Releases whose CLIP adapter is gone or
        damaged are left out.

        Raises:
            ReleaseError: the encoders cannot tell the spaces of what answers requests.
        """
        rows = await asyncio.to_thread(read_residency, self.ledger, self.size)
        return await resolve_residency(rows, self._known)

    async def retire(self, patience_seconds: float = 60.0) -> None:
        """Unload what left the window, once no request that was stamped with it is in flight."""
        deadline = time.monotonic() + patience_seconds
        while True:
            async with self._turn:  # so that nothing is unloaded that a proposal is being prepared with
                keep = await self.residency()
                if not set(await self.broadcast.in_flight()) - {snapshot.release for snapshot in keep.window}:
                    await self.broadcast.retire(keep)
                    return
            if time.monotonic() > deadline:
                return  # a later release retires it; memory is bounded by what is in flight
            await asyncio.sleep(0.1)

    def _propose_initial(self) -> ProposalRow:
        return self.ledger.propose(
            "initial", family="both", clip=None, vlm=None, actor="ratchet", reason="first start", expected_live=0
        )

    async def _ordered(
        self, kind: ProposalKind, adapters: Adapters, command: LiveCommand, share: float = 1.0, forced: bool = False
    ) -> Outcome:
        """Propose what an operator ordered, and run it."""
        async with self._turn:
            proposal = await asyncio.to_thread(
                lambda: self.ledger.propose(
                    kind, family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"),
                    actor=command.actor, reason=command.reason, expected_live=command.expected_live, share=share,
                    forced=forced,
                )
            )  # fmt: skip
            return await self._run(proposal)

    async def _run(self, proposal: ProposalRow) -> Outcome:
        try:
            return await self._carry_out(proposal)
        except Postponed:
            await asyncio.to_thread(self.ledger.advance_proposal, proposal.id, "pending")
            raise
        except RatchetError as error:
            await self._fail(proposal, str(error))
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            await self._fail(proposal, reason)
            raise ReleaseError(
                f"proposal {proposal.id} failed: {reason}.", "What was live stays live; look at the server's log."
            ) from error

    async def _fail(self, proposal: ProposalRow, reason: str) -> None:
        await asyncio.to_thread(self.ledger.advance_proposal, proposal.id, "failed", reason)

    async def _carry_out(self, proposal: ProposalRow) -> Outcome:
        began = time.perf_counter()
        live = await asyncio.to_thread(self.ledger.live)
        number = live.number if live else 0
        if proposal.expected_live is not None and proposal.expected_live != number:
            raise ReleaseConflict(
                f"release {number} is live, not {proposal.expected_live}: somebody released first.",
                "Look at `ratchet releases list` and decide again.",
            )
        if proposal.family == "vlm" and not self.broadcast.has_vlm:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        if proposal.kind == "update":
            await self._refuse_withdrawn(proposal)
        await asyncio.to_thread(self.ledger.advance_proposal, proposal.id, "preparing")
        stable = await asyncio.to_thread(self.ledger.stable)
        share = self.update_share if proposal.kind == "update" else proposal.share
        goal: Mapping[Family, str | None] = {
            family: proposed_adapters(proposal).get(family, stable.adapter(family) if stable else None)
            for family in ("clip", "vlm")
        }
        await self._make_ready(proposal, goal, live)
        prepared = time.perf_counter()
        await asyncio.to_thread(
            lambda: self.ledger.commit_release(
                number + 1, clip=goal["clip"], vlm=goal["vlm"], actor=proposal.actor, reason=proposal.reason,
                proposal_id=proposal.id, share=share,
            )
        )  # fmt: skip
        acknowledged = await self._announce()
        done = time.perf_counter()
        return Outcome(
            number + 1, goal["clip"], goal["vlm"], proposal.kind, proposal.family, proposal.id, prepared - began,
            done - prepared, acknowledged, share,
        )  # fmt: skip

    async def _refuse_withdrawn(self, proposal: ProposalRow) -> None:
        """An update may make again what the guard took back: same data, same recipe, same adapter."""
        withdrawn = await asyncio.to_thread(self.ledger.withdrawn, [*proposed_adapters(proposal).values()])
        for name, why in withdrawn.items():
            raise ReleaseError(f"{name} was withdrawn: {why}", "An operator can release it with --force.")

    async def _make_ready(
        self, proposal: ProposalRow, goal: Mapping[Family, str | None], live: ReleaseRow | None
    ) -> None:
        """Both families at once, only what changes, in a task that a rollback may cancel."""
        jobs: list[Coroutine[Any, Any, None]] = []
        if live is None or goal["clip"] != live.clip:
            jobs.append(self._ready_clip(goal["clip"], live.number + 1 if live else 1))
        if self.broadcast.has_vlm and (live is None or goal["vlm"] != live.vlm):
            jobs.append(self._ready_vlm(goal["vlm"]))
        work = _Work(proposal, asyncio.get_running_loop().create_task(_together(jobs)))
        self._work = work
        try:
            await work.task
        except asyncio.CancelledError:
            if not work.stopped_by:
                work.task.cancel()
                raise  # this process ends: the proposal stays, and is taken up at the next start
            if proposal.kind == "update" and {proposal.family, work.stopped_for} == {"clip", "vlm"}:
                raise Postponed from None
            raise ReleaseConflict(f"{work.stopped_by}.", "Look at what is live, and propose again.") from None
        finally:
            self._work = None

    async def _ready_clip(self, clip: str | None, number: int) -> None:
        image, text = await self._prepare(clip)
        residency = await asyncio.to_thread(read_residency, self.ledger, self.size)
        # A resident space is kept complete all the time: a rollback need not wait for rows that arrive right now.
        await self.broadcast.cover(ReleaseSnapshot(number, clip, image, text), wait=clip not in residency.clips)

    async def _ready_vlm(self, vlm: str | None) -> None:
        _check(await self.broadcast.prepare_vlm(vlm), vlm, "the VLM base")

    async def _announce(self) -> int:
        """The release is committed: a replica that this does not reach follows the ledger by itself."""
        try:
            return await self.broadcast.announce(await self.residency())
        except Exception:
            return 0

    async def _prepare(self, clip: str | None) -> tuple[str, str]:
        return self._agreed(clip, await self.broadcast.prepare(clip))

    def _agreed(self, clip: str | None, answers: list[Prepared]) -> tuple[str, str]:
        _check(answers, clip, "the base")
        spaces = {(answer.image_space, answer.text_space) for answer in answers}
        if len(spaces) != 1:
            raise ReleaseError(
                f"replicas disagree about the embedding spaces of {clip or 'the base'}: {sorted(spaces)}.",
                "Run the same version and the same base on every node.",
            )
        self._spaces[clip] = spaces.pop()
        return self._spaces[clip]

    async def _known(self, clip: str | None) -> tuple[str, str] | None:
        if clip in self._spaces:
            return self._spaces[clip]
        answers = await self.broadcast.prepare(clip)
        if answers and all(answer.unservable for answer in answers):
            return None
        return self._agreed(clip, [answer for answer in answers if not answer.unservable])


def _check(answers: list[Prepared], adapter: str | None, base: str) -> None:
    for answer in answers:
        if answer.error:
            raise ReleaseError(f"{adapter or base} cannot be served: {answer.error}")


async def _together(jobs: list[Coroutine[Any, Any, None]]) -> None:
    """All jobs at once; the first failure stops the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
