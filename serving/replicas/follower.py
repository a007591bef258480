"""Keeps a replica in step with the ledger: covers for a broadcast that did not reach it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from ops import metrics
from serving.releases.residency import ResidencyRows
from serving.releases.types import Prepared

log = logging.getLogger("ratchet.follower")
FOLLOW_SECONDS: Final = 2.0
LAG_SECONDS: Final = 60.0
"""A replica that could not load the live release for this long says so to Serve, which replaces it."""


class ResidencyFollower:
    """Reads the residency every :data:`FOLLOW_SECONDS` and loads what is missing. Use from one event loop."""

    def __init__(
        self,
        deployment: Literal["encoder", "vlm"],
        read: Callable[[], ResidencyRows],
        load: Callable[[ResidencyRows], Awaitable[Sequence[Prepared]]],
    ) -> None:
        """Args:
        deployment: for the metrics.
        read: reads the ledger; called in a thread.
        load: loads what answering needs, and returns what came of each adapter.
        """
        self._deployment = deployment
        self._read = read
        self._load = load
        self._in_step = time.monotonic()
        self._last_error = ""
        self._task: asyncio.Task[None] | None = None

    def mark_in_step(self) -> None:
        """The replica serves the live release at this moment."""
        self._in_step = time.monotonic()

    async def check(self) -> None:
        """Start to follow, if that is not done yet.

        Raises:
            RuntimeError: the live release could not be loaded for :data:`LAG_SECONDS`.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._follow())
        lag = time.monotonic() - self._in_step
        if lag > LAG_SECONDS:
            raise RuntimeError(f"behind the live release for {lag:.0f} s: {self._last_error}")

    async def step(self) -> None:
        """Look at the ledger once. A ledger that is away is logged: the replica serves on with what is loaded."""
        try:
            rows = await asyncio.to_thread(self._read)
            prepared = await self._load(rows)
            self._last_error = "; ".join(each.error for each in prepared if each.error)
            if not self._last_error:
                self.mark_in_step()
                if rows.window:
                    metrics.release.live(self._deployment, rows.window[0].number)
        except Exception as error:
            self._last_error = f"{type(error).__name__}: {error}"
            log.warning("cannot follow the ledger: %s", self._last_error)

    async def _follow(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(FOLLOW_SECONDS)
