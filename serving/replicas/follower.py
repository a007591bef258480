"""Keeps a replica in step with the ledger: covers for a broadcast that did not reach it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from core import metrics
from serving.own_threads import OwnThreads
from serving.releases.residency import ResidencyRows
from serving.releases.types import Prepared

log = logging.getLogger("ratchet.follower")
FOLLOW_SECONDS: Final = 2.0
LAG_SECONDS: Final = 60.0
"""A replica that could not load the live release for this long says so to Serve, which replaces it."""


def check_start(prepared: Sequence[Prepared], needed: Sequence[str | None]) -> None:
    """Refuse a start that could answer nothing, or whose failure another replica would not have. A live adapter that
    is gone or damaged is no reason: an older release is served then.

    Raises:
        RuntimeError: the replica cannot be used.
    """
    failed = [each for each in prepared if each.error and each.adapter in needed]
    if not failed:
        return
    reasons = "; ".join(each.error for each in failed)
    if any(each.cause in ("", "replica") for each in failed) or all(each.error for each in prepared):
        raise RuntimeError(f"the live release cannot be loaded: {reasons}")
    log.error("the live release cannot be loaded, an older one is served: %s", reasons)


class ResidencyFollower:
    """Reads the residency every :data:`FOLLOW_SECONDS` and loads what is missing. Use from one event loop.

    Only a failure of the replica itself counts as a lag. While the ledger or the artifacts are away, or the files of
    an adapter are damaged, a new replica would do no better: this one serves on with what it has.
    """

    def __init__(
        self,
        deployment: Literal["encoder", "vlm"],
        read: Callable[[], ResidencyRows],
        load: Callable[[ResidencyRows], Awaitable[Sequence[Prepared]]],
        keep: Callable[[ResidencyRows], None] = lambda rows: None,
    ) -> None:
        """Args:
        deployment: for the metrics.
        read: reads the ledger; called in a thread, and bounded in time.
        load: loads what answering needs, and returns what came of each adapter.
        keep: keeps copies of what was read; called in a thread, and bounded in time.
        """
        self._deployment = deployment
        self._read = read
        self._threads = OwnThreads("follower")
        self._load = load
        self._keep = keep
        self._behind_since: float | None = None
        self._last_error = ""
        self._last_problem = ""
        self._task: asyncio.Task[None] | None = None

    def mark_in_step(self) -> None:
        """The replica serves the live release at this moment."""
        self._behind_since = None

    async def check(self) -> None:
        """Start to follow, if that is not done yet.

        Raises:
            RuntimeError: the live release could not be loaded for :data:`LAG_SECONDS`.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())
        if self._behind_since is not None and (lag := time.monotonic() - self._behind_since) > LAG_SECONDS:
            raise RuntimeError(f"behind the live release for {lag:.0f} s: {self._last_error}")

    async def step(self) -> None:
        """Look at the ledger once, load what is missing, and keep a copy."""
        try:
            rows = await self._threads.run(self._read)
        except Exception as error:
            self.mark_in_step()  # what is live now is not known, so there is nothing to be behind of
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
