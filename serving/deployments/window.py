"""The resident releases as the ledger tells them: the safety net of replicas that missed the controller's word."""

from __future__ import annotations

import asyncio
import logging

from ray.serve.handle import DeploymentHandle

from ops.ledger import Ledger
from serving.deployments.protocol import Prepared
from serving.deployments.stamps import Stamp

log = logging.getLogger("ratchet.window")


class LedgerWindow:
    """Reads the newest releases; asks an encoder for the spaces of each adapter, once (adapters never change)."""

    def __init__(self, ledger: Ledger, encoder: DeploymentHandle, size: int) -> None:
        self.ledger = ledger
        self.encoder = encoder
        self.size = size
        self._spaces: dict[str | None, tuple[str, str]] = {}

    async def read(self, newer_than: int = 0) -> list[Stamp]:
        """Stamps, newest first; none when nothing newer is live, or when the live adapter cannot be served."""
        rows = await asyncio.to_thread(self.ledger.releases, self.size)
        if not rows or rows[0].number <= newer_than:
            return []
        window: list[Stamp] = []
        for row in rows:
            if row.clip not in self._spaces:
                prepared: Prepared = await self.encoder.prepare.remote(row.clip)
                if prepared.error:
                    log.error("release %d cannot be served: %s", row.number, prepared.error)
                    if not window:
                        return []
                    continue
                self._spaces[row.clip] = (prepared.image_space, prepared.text_space)
            window.append(Stamp(row.number, row.clip, *self._spaces[row.clip]))
        return window
