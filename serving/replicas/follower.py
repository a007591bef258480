"""The start of a replica, and a loop that follows the ledger in case a broadcast did not arrive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.errors import ReleaseError
from core.ledger import Ledger
from core.settings import Settings
from serving.own_threads import OwnThreads
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.ray.replica_process import keep_running
from serving.releases.broadcast import APP, INGRESS
from serving.releases.residency import ResidencyRows, ResidencySource, resolve_residency
from serving.releases.types import Prepared, Residency

log = logging.getLogger("ratchet.follower")
FOLLOW_SECONDS: Final = 2.0
LAG_SECONDS: Final = 60.0
"""Serve replaces a replica that could not load the live release for this long."""
PREPARE_SECONDS: Final = 30.0
UNSERVABLE_SECONDS: Final = 5.0
"""Between tries of an adapter whose files were gone or damaged."""
CLIP_SECONDS: Final = 30.0
"""Longest wait for CLIP, which takes some ten seconds to load (a VLM: a minute of every core)."""
LOOK_SECONDS: Final = 0.2


def check_start(prepared: Sequence[Prepared], needed: Sequence[str | None]) -> None:
    """Abort a start that could answer nothing, or whose failure is the replica's own, with RuntimeError. A live adapter
    that is gone or damaged does not prevent it: an older release is served then."""
    failed = [each for each in prepared if each.error and each.adapter in needed]
    if not failed:
        return
    reasons = "; ".join(each.error for each in failed)
    if any(each.cause in ("", "replica") for each in failed) or all(each.error for each in prepared):
        raise RuntimeError(f"the live release cannot be loaded: {reasons}")
    log.error("the live release cannot be loaded, an older one is served: %s", reasons)


class ResidencyFollower:
    """Reads the residency every :data:`FOLLOW_SECONDS` and loads what is missing. Use from one event loop. Only
    failures of the replica itself count as lag: while the ledger or the artifacts are away, or files of an adapter are
    damaged, a new replica would do no better."""

    def __init__(
        self,
        deployment: Literal["encoder", "vlm"],
        read: Callable[[], ResidencyRows],
        load: Callable[[ResidencyRows], Awaitable[Sequence[Prepared]]],
        keep: Callable[[ResidencyRows], None] = lambda rows: None,
    ) -> None:
        """``read`` and ``keep`` (of copies) are called in a thread, and bounded in time. ``load`` returns the result
        for each adapter that answering needs."""
        self._deployment = deployment
        self._read = read
        self._threads = OwnThreads("follower")
        self._load = load
        self._keep = keep
        self._behind_since: float | None = None
        self._last_error = ""
        self._last_problem = ""
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def mark_in_step(self) -> None:
        self._behind_since = None

    async def check(self) -> None:
        """Start following. Raises RuntimeError when the live release could not be loaded for :data:`LAG_SECONDS`."""
        keep_running(self._tasks, {"follow": self._follow})
        if self._behind_since is not None and (lag := time.monotonic() - self._behind_since) > LAG_SECONDS:
            raise RuntimeError(f"behind the live release for {lag:.0f} s: {self._last_error}")

    async def step(self) -> None:
        """Read the ledger once, load what is missing, and keep a copy."""
        try:
            rows = await self._threads.run(self._read)
        except Exception as error:
            self.mark_in_step()  # without knowing what is live it cannot be behind
            self._say(f"cannot follow the ledger: {type(error).__name__}: {error}")
            return
        try:
            prepared = await self._load(rows)
        except Exception as error:
            self._fall_behind(f"{type(error).__name__}: {error}")
            return
        failed = [each for each in prepared if each.error]
        if any(each.cause in ("", "replica") for each in failed):
            self._fall_behind("; ".join(each.error for each in failed))
            return
        self.mark_in_step()
        self._say("; ".join(f"{each.adapter} cannot be loaded: {each.error}" for each in failed))
        if not failed:
            if rows.window:
                metrics.release.live(self._deployment, rows.window[0].number)
            await self._threads.run(self._keep, rows)

    def _fall_behind(self, reason: str) -> None:
        if self._behind_since is None:
            self._behind_since = time.monotonic()
        self._last_error = reason
        self._say(f"cannot load the live release: {reason}")

    def _say(self, problem: str) -> None:
        """Log a problem once, not every two seconds, and its end."""
        if problem != self._last_problem:
            log.warning("%s", problem or "following the ledger again")
        self._last_problem = problem

    async def _follow(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(FOLLOW_SECONDS)


class ResidencyReader:
    """Reads the newest releases, and asks an encoder once for the spaces of each adapter, which never change."""

    def __init__(
        self,
        read: Callable[[], ResidencyRows],
        prepare: Callable[[str | None], Awaitable[Prepared]],
        prepare_all: Callable[[str | None], Awaitable[Sequence[Prepared]]],
    ) -> None:
        """``prepare``: makes any encoder load a CLIP adapter; ``prepare_all``: all of them. ``read``: called in a
        thread."""
        self._read = read
        self._threads = OwnThreads("residency")
        self._prepare = prepare
        self._prepare_all = prepare_all
        self._spaces: dict[str | None, tuple[str, str]] = {}
        self._gone: dict[str | None, float] = {}

    async def read(self, newer_than: int = 0) -> Residency | None:
        """The residency; None when nothing newer can be served. Raises RatchetError when neither ledger nor copy can be
        read, or no encoder can tell the spaces now."""
        rows = await self._threads.run(self._read)
        if not rows.window or rows.window[0].number <= newer_than:
            return None
        residency = await resolve_residency(rows, self._spaces_of)
        for clip in set(self._spaces).difference(rows.clips):
            del self._spaces[clip]
        newest = residency.window[0].release if residency.window else 0
        metrics.release.unservable("clip", newest < rows.window[0].number)
        return residency if newest > newer_than else None

    async def _spaces_of(self, clip: str | None) -> tuple[str, str] | None:
        if clip not in self._spaces:
            if time.monotonic() < self._gone.get(clip, 0.0):
                return None
            prepared = await self._prepare(clip)
            if prepared.unservable:  # on that node: another may have an intact copy
                answers = await self._prepare_all(clip)
                prepared = next((answer for answer in answers if not answer.unservable), prepared)
            if prepared.unservable:
                log.error("%s cannot be served: %s", clip or "the base", prepared.error)
                self._gone[clip] = time.monotonic() + UNSERVABLE_SECONDS
                return None
            if prepared.error:
                raise ReleaseError(f"the spaces of {clip or 'the base'} are not known: {prepared.error}")
            self._gone.pop(clip, None)
            self._spaces[clip] = (prepared.image_space, prepared.text_space)
        return self._spaces[clip]


def residency_reader(settings: Settings, ledger: Ledger, encoder: DeploymentHandle, part: str) -> ResidencyReader:
    async def prepare(clip: str | None) -> Prepared:
        attempts = Attempts(PREPARE_SECONDS, "encoder")
        answer: Prepared = await call_replica(lambda: encoder.prepare.remote(clip), attempts, retry_full=True)
        return answer

    async def prepare_all(clip: str | None) -> Sequence[Prepared]:
        return await call_every_replica(encoder, "prepare", clip, seconds=PREPARE_SECONDS)

    return ResidencyReader(ResidencySource.of(settings, ledger, part).newest, prepare, prepare_all)


async def wait_for_clip() -> None:
    """Return when an ingress of this server knows the live release, or after :data:`CLIP_SECONDS`. Imports take seconds
    of a core in each process; all at once they would delay CLIP."""
    try:
        async with asyncio.timeout(CLIP_SECONDS):
            ingress = serve.get_deployment_handle(INGRESS, APP)
            while not await ingress.resident.remote():
                await asyncio.sleep(LOOK_SECONDS)
    except Exception as error:  # waiting only spares CLIP some seconds
        log.warning("started without waiting for CLIP: %s: %s", type(error).__name__, error)
