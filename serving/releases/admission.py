"""Admission: each request is stamped with a release, which is counted as used until the request has ended.

One :class:`Admission` lives in each ingress replica. It is used from one event loop only, so it needs no lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from core import metrics
from core.ledger.rows import Family
from core.metrics.serving import Age
from core.request_context import note
from serving.errors import NotReady, Unavailable, UnknownModel
from serving.releases.guard import RequestCounts
from serving.releases.types import ReleaseSnapshot

FAMILY: Family = "clip"


class Admission:
    """The releases that requests may be stamped with, newest first, and how many requests each has in flight."""

    def __init__(self) -> None:
        self.window: tuple[ReleaseSnapshot, ...] = ()
        """Resident releases, newest first."""
        self.stable: ReleaseSnapshot | None = None
        """The newest plain release: it answers callers whom the live one does not."""
        self.splits = False
        """True if a canary or a shadow is live, so that it matters who asks."""
        self.closed = False
        """True if no more requests are admitted."""
        self._in_flight: dict[int, int] = {}
        self._answered: dict[int, RequestCounts] = {}

    @property
    def live(self) -> ReleaseSnapshot | None:
        """The live release, as far as this replica knows."""
        return self.window[0] if self.window else None

    def close(self) -> None:
        """Admit no more requests: the server ends when those in flight have ended."""
        self.closed = True

    def adopt(self, window: Sequence[ReleaseSnapshot]) -> int:
        """Take a newer window; an older one (a late message) changes nothing. Returns the live number."""
        ordered = tuple(sorted(window, key=lambda snapshot: -snapshot.release))
        if ordered and (self.live is None or ordered[0].release >= self.live.release):
            self.window = ordered
            self.stable = next((snapshot for snapshot in ordered if snapshot.share >= 1), None)
            self.splits = ordered[0].share < 1
            numbers = {snapshot.release for snapshot in ordered} | set(self._in_flight)
            self._answered = {number: self._answered.get(number, RequestCounts()) for number in numbers}
            self._record_in_flight()
        return self.live.release if self.live else 0

    def resolve(self, model: str, family: Family = FAMILY, key: str = "") -> ReleaseSnapshot:
        """``clip`` (or ``vlm``) is what is live, ``clip@12`` a resident release, an adapter's name its newest release.

        Args:
            key: of the caller. While a canary is live it says which side answers; without one, the stable side does.

        Raises:
            UnknownModel: names what is resident.
            NotReady: nothing is live yet.
        """
        live = self.live
        if live is None:
            raise NotReady("no release is live yet.", "Wait until /health/ready answers 200.")
        if model == family:
            return self._side(live, key) if self.splits else live
        for snapshot in self.window:
            if model in (f"{family}@{snapshot.release}", snapshot.shown(family)):
                return snapshot
        raise UnknownModel(f"model {model[:80]!r} is not resident.", f"Resident are: {', '.join(self.names(family))}.")

    def names(self, family: Family = FAMILY) -> list[str]:
        """Every name that :meth:`resolve` takes."""
        names: list[str] = [family, *(f"{family}@{snapshot.release}" for snapshot in self.window)]
        return names + list(dict.fromkeys(snapshot.shown(family) for snapshot in self.window))

    @contextmanager
    def admit(
        self,
        model: str = FAMILY,
        family: Family = FAMILY,
        key: str = "",
        is_fault: Callable[[Exception], bool] = lambda error: True,
    ) -> Iterator[ReleaseSnapshot]:
        """Stamp one request, and count it until the block ends. ``is_fault``: whether what the block raises counts
        against the release.
        """
        if self.closed:
            raise Unavailable("the server is ending.", "Send the request to another server, or again shortly.")
        snapshot = self.resolve(model, family, key)
        number = snapshot.release
        note(snapshot.shown(family), number)
        self._in_flight[number] = self._in_flight.get(number, 0) + 1
        self._record_in_flight()
        try:
            yield snapshot
        except Exception as error:
            if is_fault(error):
                self.failed(number)
            raise
        finally:
            left = self._in_flight[number] - 1
            if left:
                self._in_flight[number] = left
            else:
                del self._in_flight[number]
            self._record_in_flight()
            if (counted := self._answered.get(number)) is not None:
                counted.requests += 1
            if self.splits:
                metrics.rollout.answered("stable" if snapshot.share >= 1 else "trial")

    def in_flight(self) -> dict[int, int]:
        """Requests being answered, by release number."""
        return dict(self._in_flight)

    def by_age(self) -> dict[Age, int]:
        """The same, by how far behind the live release each one is."""
        newest = [snapshot.release for snapshot in self.window[:2]]
        counts: dict[Age, int] = {"live": 0, "incumbent": 0, "older": 0}
        for number, count in self._in_flight.items():
            counts["older" if number not in newest else "live" if number == newest[0] else "incumbent"] += count
        return counts

    def _record_in_flight(self) -> None:
        metrics.release.in_flight(self.by_age())

    def failed(self, release: int) -> None:
        """A request of this release failed through no fault of its client."""
        if release in self._answered:
            self._answered[release].failed += 1

    def answered(self) -> dict[int, RequestCounts]:
        """Requests that ended, by resident release, since this process knows the release."""
        return dict(self._answered)

    def _side(self, live: ReleaseSnapshot, key: str) -> ReleaseSnapshot:
        chosen = bool(key) and canary_bucket(live.clip, live.vlm, key) < live.share
        return live if chosen else self.stable or live


def canary_bucket(clip: str | None, vlm: str | None, key: str) -> float:
    """The place of a caller between 0 and 1 (not included): a canary with a share above it answers.

    It is the SHA-256 of the caller's key and of the canary's adapters. So a caller sees one side for as long as these
    adapters are tried, every ingress agrees without asking, and a larger share only adds callers: a caller on the
    canary's side at a tenth is still there at a half. Other adapters draw other callers first.
    """
    digest = hashlib.sha256(f"{clip}\n{vlm}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)
