"""The resident releases as the ledger tells them: the safety net of replicas that missed the controller's word."""

from __future__ import annotations

import asyncio
import logging

from ray.serve.handle import DeploymentHandle

from ops.ledger import Ledger
from serving.releases.residency import Residency, read_residency, resolve_residency
from serving.releases.types import Prepared

log = logging.getLogger("ratchet.window")


class ResidencyReader:
    """Reads the newest releases; asks an encoder for the spaces of each adapter, once (adapters never change)."""

    def __init__(self, ledger: Ledger, encoder: DeploymentHandle, size: int) -> None:
        self.ledger = ledger
        self.encoder = encoder
        self.size = size
        self._spaces: dict[str | None, tuple[str, str]] = {}

    async def read(self, newer_than: int = 0) -> Residency | None:
        """What is resident; None when nothing newer is live, or when the live adapter cannot be served."""
        rows = await asyncio.to_thread(read_residency, self.ledger, self.size)
        if not rows.window or rows.window[0].number <= newer_than:
            return None
        found = await resolve_residency(rows, self._spaces_of)
        return found if found.window else None

    async def _spaces_of(self, clip: str | None) -> tuple[str, str] | None:
        if clip not in self._spaces:
            prepared: Prepared = await self.encoder.prepare.remote(clip)
            if prepared.error:
                log.error("%s cannot be served: %s", clip or "the base", prepared.error)
                return None
            self._spaces[clip] = (prepared.image_space, prepared.text_space)
        return self._spaces[clip]
