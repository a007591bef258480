"""The replicas behind Ray handles: broadcasts that reach every one, and calls to the catalog."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.serve.handle import DeploymentHandle

from ops.errors import ReleaseError, StoreError
from serving.catalog.queries import Filters, Hit
from serving.errors import DeadlineExceeded, Unavailable
from serving.releases.observations import Observations
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.residency import Residency
from serving.releases.types import NO_VLM, Prepared

log = logging.getLogger("ratchet.fleet")
APP = "ratchet"
INGRESS = "Ingress"
PREPARE_SECONDS = 300.0
ACKNOWLEDGE_SECONDS = 10.0
VLM_RETIRE_SECONDS = 2.0
"""A VLM takes a minute to start, and starts with nothing to unload: releases of CLIP do not wait for it."""


async def call_every_replica(handle: DeploymentHandle, method: str, *args: Any, timeout_seconds: float) -> list[Any]:
    """Call a method on every running replica. When one dies on the way, all are asked again: methods are idempotent.

    Raises:
        ReleaseError: no round without a dead replica within the time.
    """
    end = time.monotonic() + timeout_seconds
    pause, trouble = 0.05, ""
    while (left := end - time.monotonic()) > 0:
        try:
            response = handle.broadcast(method, *args)
            results = await asyncio.wait_for(response.results_async(return_exceptions=True), left)
        except TimeoutError:
            trouble = trouble or "no answer"
            break
        except Exception as error:  # no replica at this moment: Serve is starting one
            trouble = f"{type(error).__name__}: {error}"[:300]
        else:
            failed = [result for result in results if isinstance(result, BaseException)]
            if results and not failed:
                return list(results)
            trouble = f"{type(failed[0]).__name__}: {failed[0]}"[:300] if failed else "no replica"
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)
    raise ReleaseError(f"not every replica answered {method!r}: {trouble}.", "See `ratchet status`, then try again.")


class RayBroadcast:
    """Implements :class:`serving.releases.protocol.Broadcast`."""

    def __init__(self, encoder: DeploymentHandle, catalog: DeploymentHandle, vlm: DeploymentHandle | None) -> None:
        self.encoder = encoder
        self.catalog = catalog
        self.vlm = vlm
        self._told: tuple[str | None, ...] = ()
        self._ingress: DeploymentHandle | None = None

    @property
    def ingress(self) -> DeploymentHandle:
        """The ingress depends on the controller, so its handle is looked up late."""
        if self._ingress is None:
            self._ingress = serve.get_deployment_handle(INGRESS, APP)
        return self._ingress

    @property
    def has_vlm(self) -> bool:
        """Whether there are VLM replicas."""
        return self.vlm is not None

    async def prepare(self, clip: str | None) -> list[Prepared]:
        """Phase one, on every encoder."""
        return await call_every_replica(self.encoder, "prepare", clip, timeout_seconds=PREPARE_SECONDS)

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        """Phase one, on every VLM replica."""
        return await call_every_replica(self._vlm, "prepare", vlm, timeout_seconds=PREPARE_SECONDS)

    async def cover(self, stamp: ReleaseSnapshot, wait: bool) -> int:
        """Coverage of the image space. Raises ReleaseError."""
        rows: int | str = await _patient(lambda: self.catalog.cover.remote(stamp, wait), 3600.0 if wait else 30.0)
        if isinstance(rows, str):
            raise ReleaseError(f"the catalog cannot be brought up to date: {rows}")
        return rows

    async def announce(self, resident: Residency) -> int:
        """What is resident to every replica; returns how many acknowledged.

        VLM replicas are told when their adapters change: one that starts right now makes no release of CLIP wait.
        """
        told: list[tuple[DeploymentHandle, list[Any]]] = [
            (self.ingress, list(resident.window)),
            (self.encoder, list(resident.clips)),
            (self.catalog, list(resident.indexed)),
        ]
        if self.vlm is not None and resident.vlms != self._told:
            told.append((self.vlm, list(resident.vlms)))
        answers = await asyncio.gather(
            *(call_every_replica(handle, "adopt", what, timeout_seconds=ACKNOWLEDGE_SECONDS) for handle, what in told)
        )
        self._told = resident.vlms
        return sum(len(answer) for answer in answers)

    async def observations(self) -> list[Observations]:
        """What each ingress replica saw of the release that is watched."""
        return await call_every_replica(self.ingress, "observations", timeout_seconds=ACKNOWLEDGE_SECONDS)

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, over all ingress replicas."""
        total: dict[int, int] = {}
        for counts in await call_every_replica(self.ingress, "in_flight", timeout_seconds=ACKNOWLEDGE_SECONDS):
            for number, count in counts.items():
                total[number] = total.get(number, 0) + count
        return total

    async def retire(self, resident: Residency) -> None:
        """Catalog before encoders: while it reconciles a space it needs that space's adapter."""
        work = [self._retire_clip(resident)]
        if self.vlm is not None:
            work.append(self._retire_vlm(resident))
        await asyncio.gather(*work)

    async def vlm_status(self) -> list[dict[str, Any]]:
        """What each VLM replica says of itself; none while all of them are starting."""
        if self.vlm is None:
            return []
        try:
            return await call_every_replica(self.vlm, "status", timeout_seconds=2.0)
        except ReleaseError:
            return []

    async def _retire_clip(self, resident: Residency) -> None:
        await call_every_replica(self.catalog, "retire", list(resident.indexed), timeout_seconds=60.0)
        await call_every_replica(self.encoder, "retire", list(resident.clips), timeout_seconds=60.0)

    async def _retire_vlm(self, resident: Residency) -> None:
        try:
            await call_every_replica(self._vlm, "retire", list(resident.vlms), timeout_seconds=VLM_RETIRE_SECONDS)
        except ReleaseError as error:
            log.info("a VLM replica is not there to unload adapters: %s", error)

    @property
    def _vlm(self) -> DeploymentHandle:
        if self.vlm is None:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        return self.vlm


class CatalogCalls:
    """Implements :class:`serving.http.app_state.Index`: reads are made again when the replica is replaced."""

    def __init__(self, handle: DeploymentHandle, timeout_seconds: float) -> None:
        self.handle = handle
        self.timeout_seconds = timeout_seconds

    async def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """The nearest samples. Raises StoreError, Unavailable."""
        found: list[Hit] | str = await _patient(
            lambda: self.handle.search.remote(space, vector, k, filters), self.timeout_seconds
        )
        if isinstance(found, str):
            raise StoreError(found)
        return found

    async def image(self, sample_id: str) -> bytes | None:
        """An encoded image, or None."""
        found: bytes | None = await _patient(lambda: self.handle.image.remote(sample_id), self.timeout_seconds)
        return found

    async def status(self) -> dict[str, Any]:
        """Rows and coverage."""
        found: dict[str, Any] = await _patient(lambda: self.handle.status.remote(), self.timeout_seconds)
        return found


async def _patient(call: Callable[[], Any], timeout_seconds: float) -> Any:
    end = time.monotonic() + timeout_seconds
    pause, trouble = 0.05, ""
    while (left := end - time.monotonic()) > 0:
        response = call()
        try:
            return await asyncio.wait_for(_value(response), left)
        except TimeoutError:
            response.cancel()
            break
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"[:300]
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, 1.0)
    if trouble:
        raise Unavailable(f"the catalog does not answer ({trouble}).", "Try again shortly.")
    raise DeadlineExceeded("the deadline passed before the catalog answered.", "Try again later.")


async def _value(response: Any) -> Any:
    return await response
