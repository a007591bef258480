"""Whether the VLM has come up since this process started: requests are refused at once until it has."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

log = logging.getLogger("ratchet.ingress")
LOOK_SECONDS: Final = 1.0
STARTING: Final = "the VLM is starting"


class VlmStart:
    """Waits for the first answer of any VLM replica. Use from one event loop.

    Later the VLM counts as started, also while a replica is replaced: a request waits for the next one then, within its
    deadline, as it does for an encoder.
    """

    def __init__(self, ask: Callable[[], Awaitable[object]], read_cause: Callable[[], str]) -> None:
        """Args:
        ask: a call that is answered once a replica runs.
        read_cause: why the last replica could not start, empty when none has failed; called in a thread.
        """
        self._ask = ask
        self._read_cause = read_cause
        self._cause = ""
        self.started = False

    @property
    def problem(self) -> str:
        """Why requests cannot be answered yet; empty once the VLM has started."""
        if self.started:
            return ""
        return f"{STARTING} again, after it failed: {self._cause}" if self._cause else f"{STARTING}."

    async def run(self) -> None:
        """Return when a replica has answered."""
        if self.started:
            return
        began = time.monotonic()
        answer = asyncio.ensure_future(self._answered())
        try:
            while not answer.done():
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
            cause = await asyncio.to_thread(self._read_cause)
        except Exception as error:  # Serve's controller restarts
            log.info("no status of the VLM: %s: %s", type(error).__name__, error)
            return
        if cause and cause != self._cause:
            log.error("the VLM cannot start, and is tried again: %s", cause)
        self._cause = cause or self._cause
