"""The order of a start: what CLIP does not need is loaded after it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ray import serve

from serving.releases.broadcast import APP, INGRESS

log = logging.getLogger("ratchet.start")
CLIP_SECONDS: Final = 30.0
"""The longest wait. CLIP takes some ten seconds to load, a VLM a minute of every core."""
LOOK_SECONDS: Final = 0.2


async def wait_for_clip() -> None:
    """Return when an ingress of this server has a release that it answers by, or after :data:`CLIP_SECONDS`.

    Imports alone take seconds of a core in each process: done all at once on a few cores, they would make everything
    late by the time that all of them take. Where CLIP answers already, as when a replica is replaced, this is a call.
    """
    try:
        async with asyncio.timeout(CLIP_SECONDS):
            ingress = serve.get_deployment_handle(INGRESS, APP)
            while not await ingress.resident.remote():
                await asyncio.sleep(LOOK_SECONDS)
    except Exception as error:  # the order only spares CLIP some seconds
        log.warning("started without waiting for CLIP: %s: %s", type(error).__name__, error)
