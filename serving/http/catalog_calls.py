"""Calls to the catalog that survive its replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from core.errors import StoreError
from serving.catalog.queries import Filters, Hit
from serving.ray.replica_calls import Attempts, call_replica


class CatalogCalls:
    """Reads of the catalog, which are made again when its replica is replaced."""

    def __init__(self, handle: DeploymentHandle, timeout_seconds: float) -> None:
        self.handle = handle
        self.timeout_seconds = timeout_seconds

    async def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """The nearest samples. Raises StoreError, Unavailable."""
        hits: list[Hit] | str = await self._call(lambda: self.handle.search.remote(space, vector, k, filters))
        if isinstance(hits, str):
            raise StoreError(hits)
        return hits

    async def image(self, sample_id: str) -> bytes | None:
        """An encoded image, or None. Raises StoreError, Unavailable."""
        image: bytes | str | None = await self._call(lambda: self.handle.image.remote(sample_id))
        if isinstance(image, str):
            raise StoreError(image)
        return image

    async def status(self) -> dict[str, Any]:
        """Rows and coverage."""
        status: dict[str, Any] = await self._call(self.handle.status.remote)
        return status

    async def _call(self, call: Callable[[], Any]) -> Any:
        return await call_replica(call, Attempts(self.timeout_seconds, "catalog"), retry_full=True)
