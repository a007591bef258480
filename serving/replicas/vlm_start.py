"""Whether the VLM has come up since this process started: requests are refused at once until it has."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from serving.ray.deployment_status import DeploymentStatus

log = logging.getLogger("ratchet.ingress")
LOOK_SECONDS: Final = 1.0
FIRST_SECONDS: Final = 2.0
"""For the first look, which a process's first request waits for."""
STARTING: Final = "the VLM is starting"


class VlmStart:
    """Waits for the first answer of any VLM replica. Use from one event loop.

    Later the VLM counts as started, also while a replica is replaced: a request waits for the next one then, within its
    deadline, as it does for an encoder.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[object]], read_status: Callable[[], DeploymentStatus | None]
    ) -> None:
        """Args:
        ask: a call that is answered once a replica runs.
        read_status: what Serve knows of the VLM's deployment; called in a thread.
        """
        self._ask = ask
        self._read_status = read_status
        self._cause = ""
        self.started = False

    @property
    def problem(self) -> str:
        """Why requests cannot be answered yet; empty once the VLM has started."""
        if self.started:
            return ""
        return f"{STARTING} again, after it failed: {self._cause}" if self._cause else f"{STARTING}."

    async def look(self) -> None:
        """Find out from Serve whether a replica runs, as when this process takes the place of another one."""
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self._look()
        except TimeoutError:
            log.info("no status of the VLM within %s s", FIRST_SECONDS)

    async def run(self) -> None:
        """Return when a replica has answered, or runs by what Serve says."""
        if self.started:
            return
        began = time.monotonic()
        answer = asyncio.ensure_future(self._answered())
        try:
            while not (answer.done() or self.started):
                await self._look()
                await asyncio.wait({answer}, timeout=LOOK_SECONDS)
        finally:
            answer.cancel()
        self.started = True
        log.warning("the VLM answers after %.0f s", time.monotonic() - began)

    async def _answered(self) -> None:
        while True:
            try:
                await self._ask()
                return
            except Exception as error:  # the replica died as it was asked
                log.info("the VLM has not started yet: %s: %s", type(error).__name__, error)
                await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        try:
            status = await asyncio.to_thread(self._read_status)
        except Exception as error:  # Serve's controller restarts
            log.info("no status of the VLM: %s: %s", type(error).__name__, error)
            return
        if status is None:
            return
        if status.cause and status.cause != self._cause:
            log.error("the VLM cannot start, and is tried again: %s", status.cause)
        self._cause = status.cause or self._cause
        self.started = self.started or status.running > 0
