"""Verbs of the ingress, of releases and of their rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from core.errors import RatchetError
from core.metrics import declared as d

Age = Literal["live", "incumbent", "older"]


class build:
    """Which version runs."""

    @staticmethod
    def started(part: str) -> None:
        """This process runs that part now."""
        try:
            number = version("ratchet-server")
        except PackageNotFoundError:  # run from a source tree
            number = "unknown"
        d.BUILD.labels(number, part).set(1)


class http:
    """Verbs of the ingress."""

    @staticmethod
    def request(route: str, status: int, seconds: float) -> None:
        """A request was answered. ``route`` is the template, never the path."""
        d.HTTP_REQUESTS.labels(route, str(status)).inc()
        d.HTTP_SECONDS.labels(route).observe(seconds)

    @staticmethod
    def in_flight(change: int) -> None:
        """A request came (+1) or went (-1)."""
        d.HTTP_IN_FLIGHT.inc(change)

    @staticmethod
    def cache_lookups(kind: str, hits: int, misses: int) -> None:
        """So many texts or images of a request were in the cache, and so many not."""
        d.CACHE_LOOKUPS.labels(kind, "hit").inc(hits)
        d.CACHE_LOOKUPS.labels(kind, "miss").inc(misses)

    @staticmethod
    def cached(size: int) -> None:
        """The cached vectors of this process take so many bytes."""
        d.CACHE_BYTES.set(size)

    @staticmethod
    def refused(reason: str) -> None:
        """An error with this code was answered."""
        d.HTTP_REFUSED.labels(reason).inc()

    @staticmethod
    def up(part: str, answers: bool) -> None:
        """Whether ``clip``, ``vlm`` or ``catalog`` answers this ingress."""
        d.SERVING_UP.labels(part).set(int(answers))

    @staticmethod
    def rate_limited(caller: str) -> None:
        """A caller was over its limit. ``caller`` is the name of a key, which only operators make, or ``anonymous``."""
        d.HTTP_LIMITED.labels(caller).inc()


class release:
    """Verbs of releases: the controller's, and of every replica that follows it."""

    @staticmethod
    def live(part: str, number: int) -> None:
        """This process serves release ``number``."""
        d.RELEASE_LIVE.labels(part).set(number)

    @staticmethod
    def committed(timestamp: float) -> None:
        """When the live release was committed; seconds since 1970."""
        d.RELEASE_COMMITTED.set(timestamp)

    @staticmethod
    def phase(phase: str, seconds: float) -> None:
        """``prepare``, ``commit`` or ``rollback`` took this long."""
        d.RELEASE_PHASE.labels(phase).observe(seconds)

    @staticmethod
    def decided(kind: str, outcome: str) -> None:
        """A proposal was committed or failed."""
        d.RELEASES.labels(kind, outcome).inc()

    @staticmethod
    def waiting(proposals: int, held: bool) -> None:
        """How many proposals are open, and whether updates are on hold."""
        d.RELEASE_PENDING.set(proposals)
        d.RELEASE_HELD.set(int(held))

    @staticmethod
    def in_flight(requests: Mapping[Age, int]) -> None:
        """Requests that this process is answering."""
        for age, count in requests.items():
            d.RELEASE_IN_FLIGHT.labels(age).set(count)

    @staticmethod
    def residency_source(part: str, source: str) -> None:
        """This process has what is resident from there."""
        for each in ("ledger", "file", "artifacts"):
            d.RELEASE_SOURCE.labels(part, each).set(int(each == source))

    @staticmethod
    def unservable(family: str, gone: bool) -> None:
        """Whether the live adapter of a family cannot be loaded from its files."""
        d.RELEASE_UNSERVABLE.labels(family).set(int(gone))

    @staticmethod
    def learned(family: str, gain: float, forgetting: float) -> None:
        """What the live adapter gained over the base and lost to it; NaN where nobody judged it."""
        d.RELEASE_GAIN.labels(family).set(gain)
        d.RELEASE_FORGETTING.labels(family).set(forgetting)


class operator:
    """Verbs of what operators do."""

    @staticmethod
    @contextmanager
    def action(name: str) -> Iterator[None]:
        """Count an action as done, or as refused when it raises an expected error.

        >>> with metrics.operator.action("rollback"): ...
        """
        try:
            yield
        except RatchetError:
            d.OPERATOR.labels(name, "refused").inc()
            raise
        d.OPERATOR.labels(name, "done").inc()


class rollout:
    """Verbs of canaries, shadows and the guard."""

    @staticmethod
    def watching(release: int, share: float) -> None:
        """The guard looks at this release (0: at none), which answers this share of the requests."""
        d.GUARD_RELEASE.set(release)
        d.RELEASE_SHARE.set(share)

    @staticmethod
    def answered(side: str) -> None:
        """A request went to the ``trial`` or to the ``stable`` side."""
        d.ROLLOUT_REQUESTS.labels(side).inc()

    @staticmethod
    def compared(family: str, outcome: str) -> None:
        """Both sides had an input: ``agree``, ``differ``, ``failed``, or it was ``dropped``."""
        d.ROLLOUT_COMPARISONS.labels(family, outcome).inc()

    @staticmethod
    def agreement(family: str, share: float) -> None:
        """Share of inputs on which both sides agree so far."""
        d.ROLLOUT_AGREEMENT.labels(family).set(share)

    @staticmethod
    def decided(decision: str, guardrail: str) -> None:
        """The guard ``rolled_back`` a release, and for which guardrail, or ``promoted`` it."""
        d.GUARD_DECISIONS.labels(decision, guardrail).inc()
