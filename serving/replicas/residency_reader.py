"""The residency as the ingress and the catalog read it: rows of the ledger or a copy, spaces of the encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ray.serve.handle import DeploymentHandle

from core.ledger import Ledger
from core.settings import Settings
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.residency import ResidencyReader
from serving.releases.residency_source import ResidencySource
from serving.releases.types import Prepared

PREPARE_SECONDS: Final = 30.0


def residency_reader(settings: Settings, ledger: Ledger, encoder: DeploymentHandle, part: str) -> ResidencyReader:
    """A reader for one process. ``part``: for the metrics."""

    async def prepare(clip: str | None) -> Prepared:
        attempts = Attempts(PREPARE_SECONDS, "encoder")
        answer: Prepared = await call_replica(lambda: encoder.prepare.remote(clip), attempts, retry_full=True)
        return answer

    async def prepare_all(clip: str | None) -> Sequence[Prepared]:
        return await call_every_replica(encoder, "prepare", clip, seconds=PREPARE_SECONDS)

    return ResidencyReader(ResidencySource.of(settings, ledger, part).newest, prepare, prepare_all)
