"""Calibrations of the releases that answer, read from the artifacts once each when first asked for; other artifacts
of theirs, each time."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pydantic import Field

from core.errors import AdapterError, ArtifactsUnavailable, RatchetError
from serving.catalog.queries import Hit
from serving.engines.calibration import MOST_ERROR, Calibration, Kind, MatchCurve, calibration_key, parse_calibration
from serving.errors import Unavailable
from serving.http.errors import field_error
from serving.own_threads import OwnThreads
from serving.releases.types import ReleaseSnapshot

log = logging.getLogger("ratchet.ingress")
READ_SECONDS: Final = 2.0
AGAIN_SECONDS: Final = 30.0
"""Until artifacts that were away, or had no calibration, are asked again."""
KEPT: Final = 16
"""Calibrations, more than releases are resident. They are 5 KB each."""
MIN_PROBABILITY = Field(
    None, ge=0, le=1, description="Leave out what matches with a lower probability. 409 where the release has no "
    "calibration of this kind of query (`ratchet gate calibrate` makes one).",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Known:
    found: Calibration
    until: float = math.inf
    away: str = ""
    """Why the artifacts could not be read."""


class Calibrations:
    """Use from one event loop. ``read``: an artifact by its key, in a thread; raises AdapterError for a missing one."""

    def __init__(
        self, read: Callable[[str], bytes], seconds: float = READ_SECONDS, again: float = AGAIN_SECONDS
    ) -> None:
        self._read, self._seconds, self._again = read, seconds, again
        self._thread, self._reading = OwnThreads("calibrations"), asyncio.Lock()
        self._known: dict[str, _Known] = {}

    async def curve(self, kind: Kind, snapshot: ReleaseSnapshot, least: float | None) -> MatchCurve | None:
        """The release's curve for a kind of query; None without one. ``least``: the request's `min_probability`; with
        it, raises ApiError without a curve or with one whose error is too large, Unavailable while the artifacts are
        away."""
        curve = (await self._of(snapshot, least is not None)).curves.get(kind)
        if least is None or (curve is not None and curve.bounded):
            return curve
        problem = "has no calibration" if curve is None else f"has a calibration error that may exceed {MOST_ERROR:.0%}"
        fix = "Run `ratchet gate calibrate`" if curve is None else "Give the gate more held-out items"
        problem = f"release {snapshot.release} {problem} for {kind} queries. {fix}, or compare scores."
        raise field_error("min_probability", problem, "not_calibrated", 409)

    async def check_length(self, asked: int | None, snapshot: ReleaseSnapshot, dim: int) -> None:
        """Raises ApiError if the gate did not show that its suites keep their scores when the release's vectors, of
        ``dim`` numbers, are cut to ``asked``; Unavailable while the artifacts are away."""
        if asked in (None, dim):
            return
        lengths = (await self._of(snapshot, True)).lengths
        if asked not in lengths:
            problem = f"the gate has not shown that release {snapshot.release} is as good with vectors of {asked}"
            fix = f"send {' or '.join(map(str, (dim, *lengths)))}, or leave it out."
            raise field_error("dimensions", f"{problem}: {fix}", "unsupported_dimensions")

    async def read(self, key: str) -> bytes:
        """An artifact. Raises AdapterError: there is none; ArtifactsUnavailable, OSError: the artifacts are away."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._thread.run(self._read, key)
        except TimeoutError:
            problem = f"the artifacts did not answer within {self._seconds:g} s."
            raise ArtifactsUnavailable(problem, "Try again.", state="slow") from None

    async def _of(self, snapshot: ReleaseSnapshot, needed: bool) -> Calibration:
        """Empty without one, and while the artifacts are away: if it is ``needed``, that raises Unavailable."""
        key = calibration_key(snapshot.image_space, snapshot.text_space)
        if self._asks(key):
            async with self._reading:
                if self._asks(key):
                    self._known[key] = await self._learn(key)
        known = self._known[key]  # without an await in between: none was dropped
        if known.away and needed:
            raise Unavailable(
                f"the calibration of release {snapshot.release} cannot be read: {known.away}", "Try again."
            )
        return known.found

    def _asks(self, key: str) -> bool:
        return key not in self._known or time.monotonic() >= self._known[key].until

    async def _learn(self, key: str) -> _Known:
        while len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        away = ""
        try:
            return _Known(parse_calibration(await self.read(key)))
        except AdapterError:  # there is none
            pass
        except (RatchetError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            away = str(error)
        if away:
            log.warning("the calibration %s cannot be read: %s", key, away)
        return _Known(Calibration(), time.monotonic() + self._again, away)


def with_probabilities(hits: Sequence[Hit], curve: MatchCurve | None, least: float | None) -> list[Hit]:
    """Hits with their probabilities, without those below the least one."""
    if curve is None:
        return list(hits)
    found = [replace(hit, probability=float(curve(hit.score))) for hit in hits]
    return found if least is None else [hit for hit in found if (hit.probability or 0.0) >= least]
