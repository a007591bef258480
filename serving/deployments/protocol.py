"""The release protocol: propose, prepare, commit, announce, retire. No Ray here.

What is live changes at one point only, the ledger row of ``commit``. Before it, nothing that clients see has changed,
so a failure costs nothing; after it, every later step may be repeated by whoever comes next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ops.errors import RatchetError, ReleaseConflict, ReleaseError
from ops.ledger.ledger import Ledger
from ops.ledger.rows import ProposalKind, ProposalRow, ReleaseRow
from serving.deployments.stamps import Stamp


@dataclass(frozen=True, slots=True)
class Prepared:
    """One encoder replica's answer to ``prepare``. ``error`` is empty when it can serve the adapter."""

    replica: str
    clip: str | None
    image_space: str = ""
    text_space: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A release that is live, and what it took. Times are seconds."""

    number: int
    clip: str | None
    kind: ProposalKind
    proposal: int | None
    prepare_seconds: float
    commit_seconds: float
    acknowledged: int


class Fleet(Protocol):
    """The replicas, as the protocol needs them. Each call reaches every replica that runs at that moment."""

    async def prepare(self, clip: str | None) -> list[Prepared]:
        """Every encoder loads the adapter beside what it serves, and runs golden inputs."""

    async def cover(self, stamp: Stamp, wait: bool) -> int:
        """Bring the catalog to full coverage of the image space (``wait=False``: only ask); returns its rows."""

    async def announce(self, window: Sequence[Stamp]) -> int:
        """Tell every replica which releases are resident, newest first; returns how many acknowledged."""

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, by release number, over all ingress replicas."""

    async def retire(self, keep: Sequence[Stamp]) -> None:
        """Unload what no kept release needs."""


class ReleaseProtocol:
    """Runs proposals one at a time, called from one event loop; the ledger guards against other processes."""

    def __init__(self, ledger: Ledger, fleet: Fleet, window: int) -> None:
        self.ledger = ledger
        self.fleet = fleet
        self.size = window
        self._turn = asyncio.Lock()
        self._spaces: dict[str | None, Stamp] = {}
        self._preparing: asyncio.Task[Stamp] | None = None
        self._stopped_by = ""

    async def start(self) -> Outcome | None:
        """Continue from the ledger: make release 1 (the base alone) if there is none, else announce what is live."""
        async with self._turn:
            if await asyncio.to_thread(self.ledger.live) is None:
                waiting = await asyncio.to_thread(self.ledger.pending_proposals)
                initial = [proposal for proposal in waiting if proposal.kind == "initial"]
                proposal = (
                    initial[0] if initial else await self._propose("initial", None, "ratchet", "first start", 0, None)
                )
                return await self._run(proposal)
            window = await self.window()
            await asyncio.gather(*(self.fleet.cover(stamp, wait=False) for stamp in window))
            await self.fleet.announce(window)
            return None

    async def step(self) -> Outcome | None:
        """Run the oldest waiting proposal, if one may run: an update's waits while updates are on hold."""
        async with self._turn:
            held = await asyncio.to_thread(self.ledger.held)
            for proposal in await asyncio.to_thread(self.ledger.pending_proposals):
                if proposal.kind == "update" and held is not None:
                    continue
                return await self._run(proposal)
            return None

    async def release(
        self, clip: str | None, *, actor: str, reason: str, expected_live: int, kind: ProposalKind = "release"
    ) -> Outcome:
        """Release an adapter (None: the base alone) for an operator who decided when ``expected_live`` was live.

        Raises:
            ReleaseConflict: something else is live by now.
            ReleaseError: the adapter cannot be served; what was live stays live.
        """
        async with self._turn:
            return await self._run(await self._propose(kind, clip, actor, reason, expected_live, None))

    async def rollback(self, *, actor: str, reason: str, expected_live: int, to: int | None = None) -> Outcome:
        """A new release with the adapters of an older one: number ``to``, or the newest that had another adapter.

        It does not queue behind a proposal that is being prepared, which may take minutes: that one is stopped, and
        fails. It was judged against what is being taken back.

        Raises:
            ReleaseError: there is nothing to roll back to.
            ReleaseConflict: something else is live by now.
        """
        rows = await asyncio.to_thread(self.ledger.releases, 1000)
        target = _rollback_target(rows, to)
        if self._preparing is not None:
            self._stopped_by = f"{actor} rolled back while it was being prepared"
            self._preparing.cancel()
        return await self.release(target.clip, actor=actor, reason=reason, expected_live=expected_live, kind="rollback")

    async def window(self) -> list[Stamp]:
        """Stamps of the resident releases, newest first. Spaces come from the encoders and are remembered."""
        rows = await asyncio.to_thread(self.ledger.releases, self.size)
        return [replace(await self._stamp(row.clip), release=row.number) for row in rows]

    async def retire(self, patience_seconds: float = 60.0) -> None:
        """Unload what left the window, once no request that was stamped with it is in flight."""
        deadline = time.monotonic() + patience_seconds
        while True:
            async with self._turn:  # so that nothing is unloaded that a proposal is being prepared with
                keep = await self.window()
                if not set(await self.fleet.in_flight()) - {stamp.release for stamp in keep}:
                    await self.fleet.retire(keep)
                    return
            if time.monotonic() > deadline:
                return  # a later release retires it; memory is bounded by what is in flight
            await asyncio.sleep(0.1)

    async def _propose(
        self, kind: ProposalKind, clip: str | None, actor: str, reason: str, expected: int, update: str | None
    ) -> ProposalRow:
        return await asyncio.to_thread(
            lambda: self.ledger.propose(
                kind, clip=clip, vlm=None, actor=actor, reason=reason, update_id=update, expected_live=expected
            )
        )

    async def _run(self, proposal: ProposalRow) -> Outcome:
        try:
            return await self._carry_out(proposal)
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
        await asyncio.to_thread(self.ledger.advance_proposal, proposal.id, "preparing")
        await self._make_ready(proposal.clip, number + 1)
        prepared = time.perf_counter()
        await asyncio.to_thread(
            lambda: self.ledger.commit_release(
                number + 1, clip=proposal.clip, vlm=proposal.vlm or (live.vlm if live else None),
                actor=proposal.actor, reason=proposal.reason, proposal_id=proposal.id,
            )
        )  # fmt: skip
        acknowledged = await self._announce()
        done = time.perf_counter()
        return Outcome(
            number + 1, proposal.clip, proposal.kind, proposal.id, prepared - began, done - prepared, acknowledged
        )

    async def _make_ready(self, clip: str | None, number: int) -> None:
        """Encoders and catalog, in a task that a rollback may cancel."""

        async def work() -> Stamp:
            stamp = replace(await self._prepare(clip), release=number)
            resident = {row.clip for row in await asyncio.to_thread(self.ledger.releases, self.size)}
            # A resident space is kept complete all the time: a rollback need not wait for rows that arrive right now.
            await self.fleet.cover(stamp, wait=clip not in resident)
            return stamp

        self._preparing = asyncio.get_running_loop().create_task(work())
        try:
            await self._preparing
        except asyncio.CancelledError:
            if not self._stopped_by:
                self._preparing.cancel()
                raise  # this process ends: the proposal stays, and is taken up at the next start
            raise ReleaseConflict(f"{self._stopped_by}.", "Look at what is live, and propose again.") from None
        finally:
            self._preparing, self._stopped_by = None, ""

    async def _announce(self) -> int:
        """The release is committed: what goes wrong here is mended by every replica's own look at the ledger."""
        try:
            return await self.fleet.announce(await self.window())
        except Exception:
            return 0

    async def _prepare(self, clip: str | None) -> Stamp:
        answers = await self.fleet.prepare(clip)
        for answer in answers:
            if answer.error:
                raise ReleaseError(f"{clip or 'the base'} cannot be served: {answer.error}")
        spaces = {(answer.image_space, answer.text_space) for answer in answers}
        if len(spaces) != 1:
            raise ReleaseError(
                f"replicas disagree about the embedding spaces of {clip or 'the base'}: {sorted(spaces)}.",
                "Run the same version and the same base on every node.",
            )
        image, text = spaces.pop()
        self._spaces[clip] = Stamp(0, clip, image, text)
        return self._spaces[clip]

    async def _stamp(self, clip: str | None) -> Stamp:
        found = self._spaces.get(clip)
        return found if found is not None else await self._prepare(clip)


def _rollback_target(rows: Sequence[ReleaseRow], to: int | None) -> ReleaseRow:
    if not rows:
        raise ReleaseError("nothing is live, so nothing can be rolled back.", "Wait for /health/ready.")
    if to is not None:
        for row in rows:
            if row.number == to:
                return row
        raise ReleaseError(f"release {to} does not exist.", "See `ratchet releases list`.")
    for row in rows[1:]:
        if row.clip != rows[0].clip:
            return row
    raise ReleaseError(
        f"no release before {rows[0].number} has another adapter.", "Name one with `to`, or release an adapter."
    )
