"""Every metric that Ratchet exports, and the verbs that record them.

What exists is declared in the upper half: names, units (base units), labels (bounded sets only). Call sites use the
verbs of the lower half, which read like the domain: ``metrics.gate.decided(outcome="passed")``.

Serving runs in several processes. With ``PROMETHEUS_MULTIPROC_DIR`` set before the first import they share one
folder, and :func:`exposition` adds them up; ingest and the updater are one process each and listen on their own port.
"""

from __future__ import annotations

import os
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    start_http_server,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LATEST: Literal["livemostrecent"] = "livemostrecent"  # of several processes, the one that wrote last and still lives

# -- stream ---------------------------------------------------------------------------------------------------------
INGEST_STORED = Counter("ratchet_ingest_samples_total", "Samples stored.", ["split"])
INGEST_REFUSED = Counter("ratchet_ingest_quarantined_total", "Records quarantined.", ["reason"])
INGEST_DUPLICATES = Counter("ratchet_ingest_duplicates_total", "Records that were already stored.", ["kind"])
INGEST_LAG = Gauge("ratchet_ingest_lag_records", "Records between the store and the end of the log.", ["partition"])
INGEST_COMMIT = Histogram("ratchet_ingest_commit_seconds", "Time of one atomic store commit.", buckets=SECONDS)
INGEST_BROKER = Gauge("ratchet_ingest_broker_up", "Whether the broker answers (1) or not (0).")
STORE_ROWS = Gauge("ratchet_store_samples", "Samples in the sample store.", ["split"])
STORE_FRAGMENTS = Gauge("ratchet_store_fragments", "Fragments of the sample store.")

# -- learning -------------------------------------------------------------------------------------------------------
UPDATE_STEPS = Counter("ratchet_update_steps_total", "Training steps done.", ["family"])
UPDATE_LOSS = Gauge("ratchet_update_loss", "Loss of the last step.", ["family", "term"])
UPDATE_SECONDS = Histogram("ratchet_update_seconds", "Time to train one update.", ["family"], buckets=LONG_SECONDS)
UPDATE_STATE = Gauge("ratchet_update_running", "Whether an update is in training (1).", ["family"])
UPDATES = Counter("ratchet_updates_total", "Updates finished.", ["family", "state"])
BUDGET_SPENT = Counter("ratchet_budget_spent_gflops_total", "Memory-adjusted GFLOPs spent.", ["purpose"])
BUDGET_LEVEL = Gauge("ratchet_budget_level_gflops", "Memory-adjusted GFLOPs left in the token bucket.")
GATE_VERDICTS = Counter("ratchet_gate_verdicts_total", "Verdicts of the gate.", ["outcome"])
GATE_SCORE = Gauge("ratchet_gate_suite_score", "Score of a suite at the last verdict.", ["suite", "model"])
GATE_MARGIN = Gauge("ratchet_gate_margin_left", "Lower bound of the difference + margin; below 0 fails.", ["suite"])
GATE_SECONDS = Histogram("ratchet_gate_seconds", "Time to judge a candidate.", buckets=LONG_SECONDS)

# -- serving --------------------------------------------------------------------------------------------------------
HTTP_REQUESTS = Counter("ratchet_http_requests_total", "HTTP requests answered.", ["route", "status"])
HTTP_SECONDS = Histogram("ratchet_http_request_seconds", "First byte in to last byte out.", ["route"], buckets=SECONDS)
HTTP_IN_FLIGHT = Gauge("ratchet_http_in_flight", "Requests being answered.", multiprocess_mode="livesum")
ENCODER_BATCH = Histogram("ratchet_encoder_batch_size", "Items in one forward pass.", ["kind"], buckets=BATCHES)
ENCODER_SECONDS = Histogram("ratchet_encoder_batch_seconds", "Time of one forward pass.", ["kind"], buckets=SECONDS)
VLM_REQUESTS = Counter("ratchet_vlm_requests_total", "Requests that a VLM replica ended.", ["kind", "outcome"])
VLM_TOKENS = Counter("ratchet_vlm_tokens_total", "Tokens read and written.", ["direction"])
VLM_SECONDS = Histogram("ratchet_vlm_request_seconds", "Time to a whole answer.", ["kind"], buckets=LONG_SECONDS)
VLM_FIRST = Histogram("ratchet_vlm_first_token_seconds", "Time to the first token of a stream.", buckets=SECONDS)
VLM_RUNNING = Gauge("ratchet_vlm_running", "Requests that are being answered.", multiprocess_mode="livesum")
VLM_QUEUE = Gauge("ratchet_vlm_waiting", "Requests that wait for a place in the batch.", multiprocess_mode="livesum")
RELEASE_LIVE = Gauge("ratchet_release_live", "Live release as a process sees it.", ["part"], multiprocess_mode="all")
RELEASE_PHASE = Histogram("ratchet_release_phase_seconds", "Time of a release phase.", ["phase"], buckets=LONG_SECONDS)
RELEASES = Counter("ratchet_releases_total", "Proposals decided.", ["kind", "outcome"])
RELEASE_SHARE = Gauge(
    "ratchet_release_share_ratio", "Share of requests that the live release answers.", multiprocess_mode=_LATEST
)
GUARD_RELEASE = Gauge("ratchet_guard_release", "Release that is watched; 0: none.", multiprocess_mode=_LATEST)
GUARD_DECISIONS = Counter("ratchet_guard_decisions_total", "Releases ended by the guard.", ["decision", "guardrail"])
ROLLOUT_REQUESTS = Counter("ratchet_rollout_requests_total", "Requests while a canary or shadow is live.", ["side"])
ROLLOUT_COMPARISONS = Counter(
    "ratchet_rollout_comparisons_total", "Inputs given to both sides unseen.", ["family", "outcome"]
)
ROLLOUT_AGREEMENT = Gauge(
    "ratchet_rollout_agreement_ratio", "Share of inputs on which both sides agree.", ["family"],
    multiprocess_mode=_LATEST,
)  # fmt: skip
CATALOG_ROWS = Gauge("ratchet_catalog_rows", "Rows embedded in the live image space.", multiprocess_mode=_LATEST)
CATALOG_COVERAGE = Gauge(
    "ratchet_catalog_coverage_ratio", "Embedded share of the corpus, least space.", multiprocess_mode=_LATEST
)
CATALOG_DELAY = Histogram(
    "ratchet_catalog_event_to_searchable_seconds", "From ingest to searchable.", buckets=LONG_SECONDS
)


class ingest:
    """Verbs of the stream."""

    @staticmethod
    def stored(count: int, split: str) -> None:
        """Samples of a split reached the store."""
        INGEST_STORED.labels(split).inc(count)

    @staticmethod
    def refused(reason: str) -> None:
        """A record went to quarantine."""
        INGEST_REFUSED.labels(reason).inc()

    @staticmethod
    def duplicate(kind: str) -> None:
        """A record was there already; kind is ``exact`` or ``perceptual``."""
        INGEST_DUPLICATES.labels(kind).inc()

    @staticmethod
    def lag(partition: int, records: int) -> None:
        """How far the store is behind one partition."""
        INGEST_LAG.labels(str(partition)).set(records)

    @staticmethod
    def committed(seconds: float) -> None:
        """One atomic commit took this long."""
        INGEST_COMMIT.observe(seconds)

    @staticmethod
    def broker(up: bool) -> None:
        """Whether the broker answers."""
        INGEST_BROKER.set(int(up))

    @staticmethod
    def store(split_rows: dict[str, int], fragments: int) -> None:
        """Size of the sample store."""
        for split, rows in split_rows.items():
            STORE_ROWS.labels(split).set(rows)
        STORE_FRAGMENTS.set(fragments)


class update:
    """Verbs of the trainer."""

    @staticmethod
    def stepped(family: str, losses: dict[str, float]) -> None:
        """One training step was done."""
        UPDATE_STEPS.labels(family).inc()
        for term, loss in losses.items():
            UPDATE_LOSS.labels(family, term).set(loss)

    @staticmethod
    def running(family: str, now: bool) -> None:
        """Whether training is going on."""
        UPDATE_STATE.labels(family).set(int(now))

    @staticmethod
    def finished(family: str, state: str, seconds: float) -> None:
        """An update came to its end."""
        UPDATES.labels(family, state).inc()
        UPDATE_SECONDS.labels(family).observe(seconds)

    @staticmethod
    def spent(purpose: str, gflops: float) -> None:
        """Budget was spent on ``train`` or ``gate``."""
        BUDGET_SPENT.labels(purpose).inc(gflops)

    @staticmethod
    def budget(level: float) -> None:
        """What is left in the token bucket."""
        BUDGET_LEVEL.set(level)


class gate:
    """Verbs of the gate."""

    @staticmethod
    def decided(outcome: str, seconds: float) -> None:
        """A verdict fell."""
        GATE_VERDICTS.labels(outcome).inc()
        GATE_SECONDS.observe(seconds)

    @staticmethod
    def suite(name: str, before: float, after: float, margin_left: float | None) -> None:
        """Scores of one suite."""
        GATE_SCORE.labels(name, "incumbent").set(before)
        GATE_SCORE.labels(name, "candidate").set(after)
        if margin_left is not None:
            GATE_MARGIN.labels(name).set(margin_left)


class http:
    """Verbs of the ingress."""

    @staticmethod
    def request(route: str, status: int, seconds: float) -> None:
        """A request was answered. ``route`` is the template, never the path."""
        HTTP_REQUESTS.labels(route, str(status)).inc()
        HTTP_SECONDS.labels(route).observe(seconds)

    @staticmethod
    def in_flight(change: int) -> None:
        """A request came (+1) or went (-1)."""
        HTTP_IN_FLIGHT.inc(change)


class encoder:
    """Verbs of the encoder replicas."""

    @staticmethod
    def batch(kind: str, items: int, seconds: float) -> None:
        """One forward pass of ``image`` or ``text`` items."""
        ENCODER_BATCH.labels(kind).observe(items)
        ENCODER_SECONDS.labels(kind).observe(seconds)


class vlm:
    """Verbs of the VLM replicas."""

    @staticmethod
    def ended(kind: str, outcome: str, seconds: float) -> None:
        """A ``reply``, ``stream`` or ``score`` ended: ``ok``, ``late``, ``ask``, ``adapter``, ``gone`` or ``dead``."""
        VLM_REQUESTS.labels(kind, outcome).inc()
        if outcome == "ok":
            VLM_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def tokens(prompt: int, completion: int) -> None:
        """So many tokens were read and written for one request."""
        VLM_TOKENS.labels("prompt").inc(prompt)
        VLM_TOKENS.labels("completion").inc(completion)

    @staticmethod
    def first_token(seconds: float) -> None:
        """A stream's first token came this long after its request."""
        VLM_FIRST.observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        """Requests in the batch, and those that wait for a place in it."""
        VLM_RUNNING.set(running)
        VLM_QUEUE.set(waiting)


class release:
    """Verbs of the release controller."""

    @staticmethod
    def live(part: str, number: int) -> None:
        """A process switched to a release."""
        RELEASE_LIVE.labels(part).set(number)

    @staticmethod
    def phase(phase: str, seconds: float) -> None:
        """``prepare``, ``commit`` or ``rollback`` took this long."""
        RELEASE_PHASE.labels(phase).observe(seconds)

    @staticmethod
    def decided(kind: str, outcome: str) -> None:
        """A proposal was committed or failed."""
        RELEASES.labels(kind, outcome).inc()


class rollout:
    """Verbs of canaries, shadows and the guard."""

    @staticmethod
    def watching(release: int, share: float) -> None:
        """The guard looks at this release (0: at none), which answers this share of the requests."""
        GUARD_RELEASE.set(release)
        RELEASE_SHARE.set(share)

    @staticmethod
    def answered(side: str) -> None:
        """A request went to the ``trial`` or to the ``stable`` side."""
        ROLLOUT_REQUESTS.labels(side).inc()

    @staticmethod
    def compared(family: str, outcome: str) -> None:
        """Both sides had an input: ``agree``, ``differ``, ``failed``, or it was ``dropped``."""
        ROLLOUT_COMPARISONS.labels(family, outcome).inc()

    @staticmethod
    def agreement(family: str, share: float) -> None:
        """Share of inputs on which both sides agree so far."""
        ROLLOUT_AGREEMENT.labels(family).set(share)

    @staticmethod
    def decided(decision: str, guardrail: str) -> None:
        """The guard ``rolled_back`` a release, and for which guardrail, or ``promoted`` it."""
        GUARD_DECISIONS.labels(decision, guardrail).inc()


class catalog:
    """Verbs of the catalog."""

    @staticmethod
    def covered(rows: int, ratio: float) -> None:
        """Rows of the live image space, and the least coverage of any resident space."""
        CATALOG_ROWS.set(rows)
        CATALOG_COVERAGE.set(ratio)

    @staticmethod
    def searchable(seconds: float) -> None:
        """A sample became searchable this long after it was ingested."""
        CATALOG_DELAY.observe(seconds)


def exposition() -> bytes:
    """The text that Prometheus scrapes, of all processes that share ``PROMETHEUS_MULTIPROC_DIR`` if it is set."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def listen(port: int, host: str = "127.0.0.1") -> None:
    """Serve this process's metrics; port 0 is off."""
    if port:
        start_http_server(port, addr=host)
