"""Admission: each request is bound to one release, which is counted as in use until the request has ended. One
:class:`Admission` for each ingress replica, used from one event loop, so without locks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from core import metrics
from core.ledger.rows import Family
from core.metrics.serving import Age
from core.request_context import note
from serving.errors import NotReady, SpaceGone, Unavailable, UnknownModel
from serving.releases.guard import RequestCounts
from serving.releases.types import ReleaseSnapshot

FAMILY: Family = "clip"


class Admission:
    """The releases that requests may use, newest first, and the number of requests in flight for each."""

    def __init__(self, aliases: Mapping[str, Family] | None = None) -> None:
        """``aliases``: further names of ``clip`` and ``vlm`` (``serve.aliases``)."""
        self.aliases = aliases or {}
        self.window: tuple[ReleaseSnapshot, ...] = ()
        self.stable: ReleaseSnapshot | None = None
        """The newest full release: it answers callers whom a canary or shadow does not."""
        self.splits = False
        """True if a canary or a shadow is live, so that the caller matters."""
        self.closed = False
        self._in_flight: Counter[int] = Counter()
        self._answered: dict[int, RequestCounts] = {}

    @property
    def live(self) -> ReleaseSnapshot | None:
        """The live release, as far as this replica knows."""
        return self.window[0] if self.window else None

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

    def resolve(self, model: str, family: Family = FAMILY, key: str = "", space: str | None = None) -> ReleaseSnapshot:
        """Resolve ``clip``, ``vlm`` or an alias (live), ``clip@12`` (a resident release), or an adapter's name (its
        newest release). ``key``: the caller's, which chooses the side while a canary is live; without one, the stable
        side answers. ``space``: an embedding space that the release must have; with ``clip``, the newest one that has
        it answers. Raises UnknownModel with the resident names, SpaceGone, NotReady while nothing is live."""
        live = self.live
        if live is None:
            raise NotReady("no release is live yet.", "Wait until /health/ready answers 200.")
        if self.aliases.get(model, model) == family:
            side = self._side(live, key) if self.splits else live
            return side if space is None else self._having(space, [side, *self.window])
        for snapshot in self.window:
            if model in (f"{family}@{snapshot.release}", snapshot.shown(family)):
                return snapshot if space is None else self._having(space, [snapshot])
        raise UnknownModel(f"model {model[:80]!r} is not resident.", f"Resident are: {', '.join(self.names(family))}.")

    def names(self, family: Family = FAMILY) -> list[str]:
        """Every name that :meth:`resolve` takes."""
        aliases = [alias for alias, meant in self.aliases.items() if meant == family]
        names: list[str] = [family, *aliases, *(f"{family}@{snapshot.release}" for snapshot in self.window)]
        return names + list(dict.fromkeys(snapshot.shown(family) for snapshot in self.window))

    @contextmanager
    def admit(
        self,
        model: str = FAMILY,
        family: Family = FAMILY,
        key: str = "",
        is_fault: Callable[[Exception], bool] = lambda error: True,
        space: str | None = None,
    ) -> Iterator[ReleaseSnapshot]:
        """Bind one request, and count it until the block ends. ``is_fault``: whether an exception counts against the
        release."""
        if self.closed:
            raise Unavailable("the server is ending.", "Send the request to another server, or again shortly.")
        snapshot = self.resolve(model, family, key, space)
        number = snapshot.release
        note(snapshot.shown(family), number)
        self._in_flight[number] += 1
        self._record_in_flight()
        try:
            yield snapshot
        except Exception as error:
            if is_fault(error):
                self.failed(number)
            raise
        finally:
            self._in_flight[number] -= 1
            if not self._in_flight[number]:
                del self._in_flight[number]
            self._record_in_flight()
            if (counted := self._answered.get(number)) is not None:
                counted.requests += 1
            if self.splits:
                metrics.rollout.answered("stable" if snapshot.share >= 1 else "trial")

    def in_flight(self) -> dict[int, int]:
        return dict(self._in_flight)

    def by_age(self) -> dict[Age, int]:
        """Requests in flight by how far their release is behind the live one."""
        newest = [snapshot.release for snapshot in self.window[:2]]
        counts: dict[Age, int] = {"live": 0, "incumbent": 0, "older": 0}
        for number, count in self._in_flight.items():
            counts["older" if number not in newest else "live" if number == newest[0] else "incumbent"] += count
        return counts

    def _record_in_flight(self) -> None:
        metrics.release.in_flight(self.by_age())

    def failed(self, release: int) -> None:
        """Count a request of this release that failed through no fault of its client."""
        if release in self._answered:
            self._answered[release].failed += 1

    def answered(self) -> dict[int, RequestCounts]:
        """Requests that ended, by resident release, since this process learned of the release."""
        return dict(self._answered)

    def _having(self, space: str, snapshots: Sequence[ReleaseSnapshot]) -> ReleaseSnapshot:
        for place, snapshot in enumerate(snapshots):
            if space in snapshot.spaces and (place == 0 or snapshot.share >= 1):
                return snapshot
        there = dict.fromkeys(each for snapshot in self.window for each in snapshot.spaces)
        raise SpaceGone(
            f"no release that may answer has the embedding space {space[:80]!r}. Resident are {', '.join(there)}.",
            "Embed again with `clip` what is to be compared, or have an operator go back to a release of that space.",
        )

    def _side(self, live: ReleaseSnapshot, key: str) -> ReleaseSnapshot:
        chosen = bool(key) and canary_bucket(live.clip, live.vlm, key) < live.share
        return live if chosen else self.stable or live


def canary_bucket(clip: str | None, vlm: str | None, key: str) -> float:
    """The place of a caller in [0, 1): a canary with a share above it answers. Hashing the caller's key and the
    canary's adapters (SHA-256) keeps a caller on one side while these adapters are tried, makes every ingress agree,
    and lets a larger share only add callers."""
    digest = hashlib.sha256(f"{clip}\n{vlm}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)
