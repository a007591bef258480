"""Verbs of the ingress, of the replicas that hold models, of the catalog, and of releases and their rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from core.errors import RatchetError
from core.metrics import declared as d

Age = Literal["live", "incumbent", "older"]


class build:
    """Verbs of the version that runs."""

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
        """True if ``clip``, ``vlm`` or ``catalog`` answers this ingress."""
        d.SERVING_UP.labels(part).set(int(answers))

    @staticmethod
    def rate_limited(caller: str) -> None:
        """A caller was over its limit. ``caller`` is the name of a key, which only operators make, or ``anonymous``."""
        d.HTTP_LIMITED.labels(caller).inc()


class encoder:
    """Verbs of the encoder replicas."""

    @staticmethod
    def batch(kind: str, items: int, seconds: float) -> None:
        """One forward pass of ``image`` or ``text`` items."""
        d.ENCODER_BATCH.labels(kind).observe(items)
        d.ENCODER_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        """Requests in a batch, and those that wait for a place in one."""
        d.ENCODER_RUNNING.set(running)
        d.ENCODER_QUEUE.set(waiting)


class vlm:
    """Verbs of the VLM replicas."""

    @staticmethod
    def ended(kind: str, outcome: str, seconds: float) -> None:
        """A ``reply``, ``stream`` or ``score`` ended: ``ok``, ``late``, ``ask``, ``adapter``, ``gone`` or ``dead``."""
        d.VLM_REQUESTS.labels(kind, outcome).inc()
        if outcome == "ok":
            d.VLM_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def tokens(prompt: int, completion: int) -> None:
        """So many tokens were read and written for one request."""
        d.VLM_TOKENS.labels("prompt").inc(prompt)
        d.VLM_TOKENS.labels("completion").inc(completion)

    @staticmethod
    def first_token(seconds: float) -> None:
        """A stream's first token came this long after its request."""
        d.VLM_FIRST.observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        """Requests in the batch, and those that wait for a place in it."""
        d.VLM_RUNNING.set(running)
        d.VLM_QUEUE.set(waiting)


class catalog:
    """Verbs of the catalog."""

    @staticmethod
    def covered(rows: int, ratio: float) -> None:
        """Rows of the live image space, and the least coverage of any resident space."""
        d.CATALOG_ROWS.set(rows)
        d.CATALOG_COVERAGE.set(ratio)

    @staticmethod
    def searchable(seconds: float) -> None:
        """A sample became searchable this long after it was ingested."""
        d.CATALOG_DELAY.observe(seconds)

    @staticmethod
    def fragments(count: int) -> None:
        """Fragments of the live image space's table."""
        d.CATALOG_FRAGMENTS.set(count)

    @staticmethod
    def backfill(missing: int, rows_per_second: float, seconds_left: float | None) -> None:
        """The resident spaces lack so many rows; the speed of embedding, and the estimate, None while there is none."""
        d.CATALOG_MISSING.set(missing)
        d.CATALOG_BACKFILL_RATE.set(rows_per_second)
        d.CATALOG_BACKFILL_LEFT.set(math.nan if seconds_left is None else seconds_left)

    @staticmethod
    def indexed(rows: int, used: bool) -> None:
        """Rows of the live image space in its index, and whether searches go through it."""
        d.CATALOG_INDEXED.set(rows)
        d.CATALOG_INDEX_USED.set(int(used))

    @staticmethod
    def index_memory(size: int) -> None:
        """Bytes of the indexes of all image spaces."""
        d.CATALOG_INDEX_BYTES.set(size)

    @staticmethod
    def index_built(seconds: float) -> None:
        """An index was made."""
        d.CATALOG_INDEX_SECONDS.observe(seconds)

    @staticmethod
    def recall(ratio: float) -> None:
        """Share of the true ten nearest rows that the index found, whether it is used or not."""
        d.CATALOG_RECALL.set(ratio)


class drift:
    """Verbs of the drift of incoming data."""

    @staticmethod
    def measured(space: str, frechet: float, mean_shift: float) -> None:
        """Distance of the newest embeddings from those before them."""
        d.DRIFT_FRECHET.labels(space).set(frechet)
        d.DRIFT_SHIFT.labels(space).set(mean_shift)


class release:
    """Verbs of releases: the controller's, and of every replica that follows it."""

    @staticmethod
    def live(part: str, number: int) -> None:
        """This process serves release ``number``."""
        d.RELEASE_LIVE.labels(part).set(number)

    @staticmethod
    def committed(timestamp: float) -> None:
        """The live release was committed at this time; seconds since 1970."""
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
        """So many proposals are open; and updates are on hold, or not."""
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
        """True if the live adapter of a family cannot be loaded from its files."""
        d.RELEASE_UNSERVABLE.labels(family).set(int(gone))

    @staticmethod
    def learned(family: str, gain: float, forgetting: float) -> None:
        """The live adapter gained and lost so much against the base; NaN where it was never judged."""
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
