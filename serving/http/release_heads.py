"""Heads of the releases that this ingress answers for: fetched from an encoder once for each adapter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from serving.engines.heads import Answers, Head
from serving.http.clip_vectors import Encoders
from serving.http.errors import ApiError
from serving.own_threads import OwnThreads
from serving.releases.release_snapshot import ReleaseSnapshot

ADAPTERS = 8
"""Whose heads are kept: those of the resident releases, a few more than one."""
THREADS = 2


class ReleaseHeads:
    """Used from one event loop. An adapter never changes, so what was fetched once is right for as long as it is
    named."""

    def __init__(self, calls: Encoders) -> None:
        self.calls = calls
        self._threads = OwnThreads("heads", THREADS)
        self._kept: OrderedDict[str | None, Mapping[str, Head]] = OrderedDict()

    async def find(self, name: str, snapshot: ReleaseSnapshot, deadline: float) -> Head:
        """A head of the snapshot's adapter.

        Raises:
            ApiError: the release has none of this name; it says which it has.
            QueueFull, DeadlineExceeded, Unavailable.
        """
        heads = self._kept.get(snapshot.clip)
        if heads is None:
            heads = await self.calls.heads(snapshot, deadline)
            self._kept[snapshot.clip] = heads
            while len(self._kept) > ADAPTERS:
                self._kept.popitem(last=False)
        if name not in heads:
            there = (
                f"It has {', '.join(sorted(heads))}." if heads else "It has none: see updater.heads in the settings."
            )
            raise ApiError(
                404, f"head: release {snapshot.release} has no head {name!r}. {there}", param="head", code="no_head"
            )
        self._kept.move_to_end(snapshot.clip)
        return heads[name]

    async def classify(self, head: Head, vectors: npt.NDArray[np.float32]) -> Answers:
        """See :meth:`Head.classify`; in a thread."""
        return await self._threads.run(head.classify, vectors)
