"""Metrics of the ingress, model replicas, catalog, releases and rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from core.errors import RatchetError
from core.metrics import declared as d

Age = Literal["live", "incumbent", "older"]
AuditOutcome = Literal["recorded", "repeated", "full", "dropped", "too_large", "url", "failed"]


class build:
    @staticmethod
    def started(part: str) -> None:
        d.BUILD.labels(build.number(), part).set(1)

    @staticmethod
    def number() -> str:
        try:
            return version("ratchet-server")
        except PackageNotFoundError:  # run from a source tree
            return "unknown"


class http:
    @staticmethod
    def request(route: str, status: int, seconds: float) -> None:
        """Count an answered request. ``route`` is the template, never the path."""
        d.HTTP_REQUESTS.labels(route, str(status)).inc()
        d.HTTP_SECONDS.labels(route).observe(seconds)

    in_flight = d.HTTP_IN_FLIGHT.inc
    """``change`` is +1 or -1."""

    @staticmethod
    def cache_lookups(kind: str, hits: int, misses: int) -> None:
        d.CACHE_LOOKUPS.labels(kind, "hit").inc(hits)
        d.CACHE_LOOKUPS.labels(kind, "miss").inc(misses)

    cached = d.CACHE_BYTES.set

    @staticmethod
    def refused(reason: str) -> None:
        d.HTTP_REFUSED.labels(reason).inc()

    @staticmethod
    def up(part: str, answers: bool) -> None:
        """True if ``clip``, ``vlm`` or ``catalog`` answers this ingress."""
        d.SERVING_UP.labels(part).set(int(answers))

    @staticmethod
    def rate_limited(caller: str) -> None:
        """``caller`` is the name of a key, which only operators make, or ``anonymous``."""
        d.HTTP_LIMITED.labels(caller).inc()


class encoder:
    @staticmethod
    def batch(kind: str, items: int, seconds: float) -> None:
        d.ENCODER_BATCH.labels(kind).observe(items)
        d.ENCODER_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        d.ENCODER_RUNNING.set(running)
        d.ENCODER_QUEUE.set(waiting)


class vlm:
    @staticmethod
    def ended(kind: str, outcome: str, seconds: float) -> None:
        """``kind``: ``reply``, ``stream`` or ``score``; ``outcome``: ``ok``, ``late``, ``ask``, ``adapter``, ``gone``
        or ``dead``."""
        d.VLM_REQUESTS.labels(kind, outcome).inc()
        if outcome == "ok":
            d.VLM_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def tokens(prompt: int, completion: int) -> None:
        d.VLM_TOKENS.labels("prompt").inc(prompt)
        d.VLM_TOKENS.labels("completion").inc(completion)

    first_token = d.VLM_FIRST.observe

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        d.VLM_RUNNING.set(running)
        d.VLM_QUEUE.set(waiting)


class catalog:
    @staticmethod
    def covered(rows: int, ratio: float) -> None:
        d.CATALOG_ROWS.set(rows)
        d.CATALOG_COVERAGE.set(ratio)

    searchable = d.CATALOG_DELAY.observe
    fragments = d.CATALOG_FRAGMENTS.set

    @staticmethod
    def backfill(missing: int, rows_per_second: float, seconds_left: float | None) -> None:
        """Set the rows that resident spaces lack, the embedding speed, and the estimated time left (None if
        unknown)."""
        d.CATALOG_MISSING.set(missing)
        d.CATALOG_BACKFILL_RATE.set(rows_per_second)
        d.CATALOG_BACKFILL_LEFT.set(math.nan if seconds_left is None else seconds_left)

    @staticmethod
    def indexed(rows: int, used: bool) -> None:
        d.CATALOG_INDEXED.set(rows)
        d.CATALOG_INDEX_USED.set(int(used))

    index_memory = d.CATALOG_INDEX_BYTES.set
    index_built = d.CATALOG_INDEX_SECONDS.observe
    recall = d.CATALOG_RECALL.set
    """Set the share of the true ten nearest rows that the index found, whether it is used or not."""


class drift:
    @staticmethod
    def measured(space: str, frechet: float, mean_shift: float) -> None:
        d.DRIFT_FRECHET.labels(space).set(frechet)
        d.DRIFT_SHIFT.labels(space).set(mean_shift)


class release:
    @staticmethod
    def live(part: str, number: int) -> None:
        d.RELEASE_LIVE.labels(part).set(number)

    other_base = d.RELEASE_OTHER_BASE.set
    """Set to 1 where the live release has another base than this server."""

    committed = d.RELEASE_COMMITTED.set
    """``timestamp``: seconds since 1970."""

    @staticmethod
    def phase(phase: str, seconds: float) -> None:
        """``phase``: ``prepare``, ``commit`` or ``rollback``."""
        d.RELEASE_PHASE.labels(phase).observe(seconds)

    @staticmethod
    def decided(kind: str, outcome: str) -> None:
        d.RELEASES.labels(kind, outcome).inc()

    @staticmethod
    def waiting(proposals: int, held: bool) -> None:
        d.RELEASE_PENDING.set(proposals)
        d.RELEASE_HELD.set(int(held))

    @staticmethod
    def in_flight(requests: Mapping[Age, int]) -> None:
        for age, count in requests.items():
            d.RELEASE_IN_FLIGHT.labels(age).set(count)

    @staticmethod
    def residency_source(part: str, source: str) -> None:
        """Set where this process reads what is resident: ``ledger``, ``file`` or ``artifacts``."""
        for each in ("ledger", "file", "artifacts"):
            d.RELEASE_SOURCE.labels(part, each).set(int(each == source))

    @staticmethod
    def unservable(family: str, gone: bool) -> None:
        """True if a family's live adapter cannot be loaded from its files."""
        d.RELEASE_UNSERVABLE.labels(family).set(int(gone))

    @staticmethod
    def learned(family: str, gain: float, forgetting: float) -> None:
        """Set the live adapter's gain and forgetting against the base; NaN if it was never judged."""
        d.RELEASE_GAIN.labels(family).set(gain)
        d.RELEASE_FORGETTING.labels(family).set(forgetting)


class feedback:
    @staticmethod
    def given(route: str, verdict: str) -> None:
        d.FEEDBACK.labels(route, verdict).inc()

    @staticmethod
    def audited(outcome: AuditOutcome) -> None:
        d.FEEDBACK_AUDITS.labels(outcome).inc()


class operator:
    @staticmethod
    @contextmanager
    def action(name: str) -> Iterator[None]:
        """Count an action as done, or as refused if it raises a RatchetError."""
        try:
            yield
        except RatchetError:
            d.OPERATOR.labels(name, "refused").inc()
            raise
        d.OPERATOR.labels(name, "done").inc()


class rollout:
    @staticmethod
    def watching(release: int, share: float) -> None:
        d.GUARD_RELEASE.set(release)
        d.RELEASE_SHARE.set(share)

    @staticmethod
    def answered(side: str) -> None:
        """``side``: ``trial`` or ``stable``."""
        d.ROLLOUT_REQUESTS.labels(side).inc()

    @staticmethod
    def compared(family: str, outcome: str) -> None:
        """``outcome``: ``agree``, ``differ``, ``failed`` or ``dropped``."""
        d.ROLLOUT_COMPARISONS.labels(family, outcome).inc()

    @staticmethod
    def agreement(family: str, share: float) -> None:
        d.ROLLOUT_AGREEMENT.labels(family).set(share)

    @staticmethod
    def decided(decision: str, guardrail: str) -> None:
        """``decision``: ``rolled_back`` (for ``guardrail``) or ``promoted``."""
        d.GUARD_DECISIONS.labels(decision, guardrail).inc()
