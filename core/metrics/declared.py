"""Every metric that Ratchet exports: name, unit, help and labels. Names start with ``ratchet_`` and end with their base
unit: seconds, bytes, flops, or ``_ratio`` for a share from 0 to 1; counters end with ``_total``. Labels have bounded
sets of values, listed in :data:`LABELS`. A gauge's mode says how the values of serving's processes are combined:
``livesum`` sums those of living processes, ``livemostrecent`` takes the last written, ``liveall`` keeps one per process
(``pid``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from prometheus_client import Counter, Gauge, Histogram

from core.metrics.exposition import install_files

install_files()  # before the first metric opens a file

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

LABELS = {
    "action": "release, promote, rollback, hold, resume, resubmit, delete: what an operator can do",
    "age": "live, incumbent (the one before it), older: a release, seen from the live one",
    "caller": "names of keys, which only operators make, and anonymous",
    "decision": "rolled_back, promoted",
    "dependency": "ledger, artifacts, store, broker, registry",
    "direction": "prompt, completion",
    "family": "clip, vlm",
    "for": "broker, store, registry: what ingest can wait for",
    "guardrail": "bounds that the guard watches, and `none` for a promotion",
    "index": "names of indexes, which only operators make",
    "kind": "of a duplicate: exact, perceptual, older; of a batch: image, text; of an answer: reply, stream, score; of "
    "a proposal: initial, update, rollback, release, promotion; of garbage: adapter, carry-over, report, work folder, "
    "score cache, engine cache",
    "model": "base, incumbent, candidate",
    "outcome": "of a verdict: kept, passed, rejected, inconclusive; of a proposal: committed, failed; of a run of "
    "maintenance: done, failed; of an action: done, refused; of an answer: ok, late, ask, adapter, gone, dead; of a "
    "comparison: agree, differ, failed, dropped; of a look into the cache: hit, miss; of an audit: recorded, repeated, "
    "full, dropped, too_large, url, failed",
    "part": "ingest, maintain, update, ingress, encoder, vlm, catalog, controller; of what an ingress asks: clip, vlm, "
    "catalog",
    "partition": "partitions of the topic",
    "phase": "prepare, commit, rollback",
    "purpose": "train, gate",
    "reason": "codes of refusals, all written in the source; of lost offsets: retention; of deleted "
    "samples: retention, deletion",
    "role": "retention, gain",
    "route": "route templates of the application, and `unmatched`",
    "side": "trial, stable: which release a request went to",
    "source": "ledger, file (in the home of the node), artifacts",
    "space": "image: the only tower whose vectors are kept",
    "split": "train, fresh_eval; held_train, held_fresh_eval: until an operator accepts them",
    "state": "of a dependency: ok, away, slow, refused, full; "
    "of the trainer: waiting, training, judging, proposing; of an update: done, failed, abandoned",
    "status": "HTTP status codes that the application uses",
    "suite": "suites of the last verdict: YAML files, and at most six domains of fresh samples",
    "term": "terms of the recipe's objective, and `loss`, their weighted sum",
    "tower": "image, text",
    "type": "of an event: candidate, verdict, proposal, release, rollback, deletion, gap, feedback",
    "verdict": "right, wrong, correct, chosen: what a caller said of an answer",
    "version": "one at a time",
}


def _latest(name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
    """A gauge of serving whose newest value counts, whichever process wrote it."""
    return Gauge(name, meaning, labels, multiprocess_mode="livemostrecent")


# -- every part -----------------------------------------------------------------------------------------------------
DEPENDENCY_STATE = _latest(
    "ratchet_dependency_state",
    "How this part finds what it depends on: 1 for one state, else 0.",
    ["dependency", "state"],
)

# -- stream ---------------------------------------------------------------------------------------------------------
INGEST_RECORDS = Counter("ratchet_ingest_records_total", "Records read from the topic and decided about.")
INGEST_BYTES = Counter("ratchet_ingest_bytes_total", "Bytes of these records: key, value and headers.")
INGEST_STORED = Counter("ratchet_ingest_samples_total", "Samples stored.", ["split"])
INGEST_REFUSED = Counter("ratchet_ingest_quarantined_total", "Records quarantined.", ["reason"])
INGEST_DUPLICATES = Counter("ratchet_ingest_duplicates_total", "Records that were already stored.", ["kind"])
INGEST_CORRECTED = Counter("ratchet_ingest_corrected_total", "Samples that were replaced by corrections of them.")
INGEST_LAG = Gauge("ratchet_ingest_lag_records", "Records between the store and the end of the log.", ["partition"])
INGEST_COMMIT = Histogram("ratchet_ingest_commit_seconds", "Time of one atomic store commit.", buckets=SECONDS)
INGEST_LOST = Counter(
    "ratchet_ingest_lost_offsets_total", "Offsets that were gone before they were read (gaps).", ["reason"]
)
INGEST_REWRITTEN = Counter(
    "ratchet_ingest_rewritten_offsets_total",
    "Offsets that were cut off the log after their records were stored (unclean leader elections).",
)
INGEST_WAITING = Gauge("ratchet_ingest_waiting", "Whether ingest waits for a dependency (1) or not (0).", ["for"])
INGEST_QUARANTINE_FAILING = Gauge(
    "ratchet_ingest_quarantine_failing", "Whether refused records cannot be published to the quarantine topic (1)."
)
STORE_ROWS = Gauge("ratchet_store_samples", "Samples in the sample store.", ["split"])
STORE_BYTES = Gauge("ratchet_store_bytes", "Data files of the sample store's newest version.")
STORE_FRAGMENTS = Gauge("ratchet_store_fragments", "Fragments of the sample store; compaction keeps them few.")
EVENTS_PUBLISHED = Counter("ratchet_events_published_total", "Events put into the events topic.", ["type"])
EVENTS_WAITING = Gauge("ratchet_events_waiting", "Events that are not in the events topic yet.")
FEEDBACK = Counter("ratchet_feedback_total", "Answers that a caller reported.", ["route", "verdict"])
FEEDBACK_AUDITS = Counter("ratchet_feedback_audits_total", "Answers drawn at random for a review.", ["outcome"])
MAINTAIN_RUNS = Counter("ratchet_maintain_runs_total", "Runs of maintenance.", ["outcome"])
MAINTAIN_LAST = Gauge(
    "ratchet_maintain_last_run_timestamp_seconds", "When a run of maintenance ended last; absent before the first.",
    ["outcome"],
)  # fmt: skip
MAINTAIN_SECONDS = Histogram("ratchet_maintain_seconds", "Time of one run of maintenance.", buckets=LONG_SECONDS)
MAINTAIN_WRITTEN = Counter("ratchet_maintain_written_bytes_total", "Bytes that compaction and deletion wrote again.")
MAINTAIN_VERSIONS = Gauge("ratchet_maintain_versions", "Versions of the sample store that are kept.")
MAINTAIN_DELETED = Counter("ratchet_maintain_deleted_samples_total", "Samples removed from the store.", ["reason"])
COLLECTED = Counter("ratchet_maintain_collected_bytes_total", "Bytes that the garbage collector deleted.", ["kind"])
DELETIONS_WAITING = Gauge("ratchet_deletions_waiting", "Deletions that were asked for and are not complete.")
DELETION_OLDEST = Gauge("ratchet_deletion_oldest_seconds", "Age of the oldest of them; 0 where there is none.")
INDEX_FAILING = Gauge(
    "ratchet_index_failing", "Whether an index outside is not kept up to date (1); none for a paused one.", ["index"]
)
DOUBLES_SETTLED = Counter(
    "ratchet_store_doubles_settled_total", "Samples stored by two workers at once, of which one was taken out again."
)

# -- learning -------------------------------------------------------------------------------------------------------
UPDATE_STATE = Gauge("ratchet_update_state", "What the trainer does now: 1 for one state, else 0.", ["family", "state"])
UPDATE_WAITING = Gauge("ratchet_update_new_samples", "Train samples that no update has learned or tried.", ["family"])
UPDATE_FRESH = Gauge("ratchet_update_fresh_items", "Independent fresh items that the gate could ask now.", ["family"])
UPDATE_FRESH_NEEDED = Gauge(
    "ratchet_update_needed_items", "Those that it needs to show a gain of gate.detect.", ["family"]
)
UPDATE_UNJUDGED = Gauge(
    "ratchet_update_unjudged", "1 while no update can be judged: suites or the reference pool are missing.", ["family"]
)
UPDATE_STEPS = Counter("ratchet_update_steps_total", "Training steps done.", ["family"])
UPDATE_LOSS = Gauge("ratchet_update_loss", "Loss of the last step.", ["family", "term"])
UPDATE_SECONDS = Histogram("ratchet_update_seconds", "Time to train one update.", ["family"], buckets=LONG_SECONDS)
UPDATES = Counter("ratchet_updates_total", "Updates finished.", ["family", "state"])
UPDATE_LEFT_OUT = Counter(
    "ratchet_update_left_out_total", "Samples that could not be prepared, and that updates went on without.", ["family"]
)
UPDATE_HELD = Counter(
    "ratchet_update_held_total", "New samples that are held because image and text agree less than is usual."
)
UPDATE_VISITED = Counter("ratchet_update_visited_total", "New samples that updates have visited.", ["family"])
UPDATE_PASSED_OVER = Counter(
    "ratchet_update_passed_over_total", "New samples of updates whose budget did not pay for them.", ["family"]
)
UPDATE_PLANNED = Gauge("ratchet_update_planned_flops", "Memory-adjusted FLOPs planned for the last update.", ["family"])
UPDATE_SPENT = Gauge("ratchet_update_spent_flops", "Memory-adjusted FLOPs that the last update spent.", ["family"])
BUDGET_LEVEL = Gauge("ratchet_budget_level_flops", "Memory-adjusted FLOPs left in the token bucket.")
BUDGET_SIZE = Gauge("ratchet_budget_size_flops", "Memory-adjusted FLOPs that the bucket holds: a day's refill.")
BUDGET_UPDATE = Gauge("ratchet_budget_update_flops", "Memory-adjusted FLOPs that the bucket must hold for an update.")
BUDGET_SPENT = Counter("ratchet_budget_spent_flops_total", "Memory-adjusted FLOPs spent.", ["purpose"])
GATE_VERDICTS = Counter(
    "ratchet_gate_verdicts_total", "Verdicts of the gate; `kept`: inconclusive, and asked again.", ["family", "outcome"]
)
GATE_LAST = Gauge(
    "ratchet_gate_last_verdict_timestamp_seconds", "When a verdict fell last; absent before the first.",
    ["family", "outcome"],
)  # fmt: skip
GATE_SECONDS = Histogram("ratchet_gate_seconds", "Time to judge a candidate.", ["family"], buckets=LONG_SECONDS)
GATE_SCORE = Gauge(
    "ratchet_gate_suite_score_ratio", "Score of a suite at the last verdict.", ["family", "suite", "role", "model"]
)
GATE_MARGIN = Gauge(
    "ratchet_gate_margin_left_ratio",
    "Lower bound of a retention suite's difference, against the worse of base and incumbent, plus its margin; below 0 "
    "it does not pass.",
    ["family", "suite"],
)
GATE_AUDIT_FAILED = Gauge(
    "ratchet_gate_audit_failed",
    "Whether the newest audit on sealed items failed and its adapter is still live (1), or not (0).",
    ["family"],
)
GATE_SHIFT = Gauge(
    "ratchet_gate_feature_shift_ratio",
    "Mean of 1 - cosine between a tower's features of a retention item by the candidate of the last verdict and by "
    "another model; 0 where nothing moved.",
    ["family", "tower", "model"],
)

# -- releases -------------------------------------------------------------------------------------------------------
RELEASE_LIVE = Gauge(
    "ratchet_release_live", "Number of the live release as a replica serves it.", ["part"], multiprocess_mode="liveall"
)
RELEASE_COMMITTED = _latest("ratchet_release_committed_timestamp_seconds", "When the live release was committed.")
RELEASE_PHASE = Histogram("ratchet_release_phase_seconds", "Time of a release phase.", ["phase"], buckets=LONG_SECONDS)
RELEASES = Counter("ratchet_releases_total", "Proposals decided.", ["kind", "outcome"])
RELEASE_PENDING = _latest("ratchet_release_proposals", "Proposals not decided yet.")
RELEASE_HELD = _latest("ratchet_release_held", "Whether updates are on hold (1) or not (0).")
RELEASE_OTHER_BASE = _latest(
    "ratchet_release_other_base",
    "Whether the live release has another base than this server (1), as while the base is switched, or not (0).",
)
RELEASE_IN_FLIGHT = Gauge(
    "ratchet_release_in_flight_requests", "Requests being answered, by the release that they were stamped with.",
    ["age"], multiprocess_mode="livesum",
)  # fmt: skip
RELEASE_SOURCE = Gauge(
    "ratchet_release_residency_source", "Where a process knows from what is resident (1), and where not (0).",
    ["part", "source"], multiprocess_mode="livemax",
)  # fmt: skip
RELEASE_UNSERVABLE = Gauge(
    "ratchet_release_unservable",
    "Whether the live adapter cannot be loaded from its files (1), so that an older release answers instead.",
    ["family"], multiprocess_mode="livemax",
)  # fmt: skip
RELEASE_GAIN = _latest(
    "ratchet_release_gain_ratio",
    "Mean difference of the live adapter to the base over its gain suites; NaN for an adapter that was never judged.",
    ["family"],
)
RELEASE_FORGETTING = _latest(
    "ratchet_release_forgetting_ratio",
    "Mean loss of the live adapter to the base over its retention suites, negative where it became better; NaN for an "
    "adapter that was never judged.",
    ["family"],
)
RELEASE_SHARE = _latest("ratchet_release_share_ratio", "Share of requests that the live release answers.")
GUARD_RELEASE = _latest("ratchet_guard_release", "Number of the release that is watched; 0: none.")
GUARD_DECISIONS = Counter("ratchet_guard_decisions_total", "Releases ended by the guard.", ["decision", "guardrail"])
ROLLOUT_REQUESTS = Counter("ratchet_rollout_requests_total", "Requests while a canary or shadow is live.", ["side"])
ROLLOUT_COMPARISONS = Counter(
    "ratchet_rollout_comparisons_total", "Inputs given to both sides unseen.", ["family", "outcome"]
)
ROLLOUT_AGREEMENT = _latest("ratchet_rollout_agreement_ratio", "Share of inputs on which both sides agree.", ["family"])
OPERATOR = Counter("ratchet_operator_actions_total", "What operators did.", ["action", "outcome"])
BUILD = Gauge("ratchet_build_info", "1, for each process that runs.", ["version", "part"], multiprocess_mode="livesum")

# -- serving --------------------------------------------------------------------------------------------------------
HTTP_REQUESTS = Counter("ratchet_http_requests_total", "HTTP requests answered.", ["route", "status"])
HTTP_SECONDS = Histogram("ratchet_http_request_seconds", "First byte in to last byte out.", ["route"], buckets=SECONDS)
HTTP_IN_FLIGHT = Gauge("ratchet_http_in_flight_requests", "Requests being answered.", multiprocess_mode="livesum")
HTTP_REFUSED = Counter("ratchet_http_refused_total", "Errors answered, by their code.", ["reason"])
CACHE_LOOKUPS = Counter(
    "ratchet_cache_lookups_total", "Texts and images that were asked for, by whether their vector was cached.",
    ["kind", "outcome"],
)  # fmt: skip
CACHE_BYTES = Gauge("ratchet_cache_bytes", "Memory of cached vectors.", multiprocess_mode="livesum")
HTTP_LIMITED = Counter(
    "ratchet_http_rate_limited_total", "Requests over the caller's limit: of a key, by its name, or anonymous.",
    ["caller"],
)  # fmt: skip
SERVING_UP = Gauge(
    "ratchet_serving_up", "Whether a model, or the catalog, answers an ingress (1) or not (0).", ["part"],
    multiprocess_mode="livemin",
)  # fmt: skip
ENCODER_BATCH = Histogram("ratchet_encoder_batch_size", "Items in one forward pass.", ["kind"], buckets=BATCHES)
ENCODER_SECONDS = Histogram("ratchet_encoder_batch_seconds", "Time of one forward pass.", ["kind"], buckets=SECONDS)
ENCODER_RUNNING = Gauge(
    "ratchet_encoder_running_requests", "Requests in a batch that is being encoded.", multiprocess_mode="livesum"
)
ENCODER_QUEUE = Gauge(
    "ratchet_encoder_waiting_requests", "Requests that wait for a place in a batch.", multiprocess_mode="livesum"
)
VLM_REQUESTS = Counter("ratchet_vlm_requests_total", "Requests that a VLM replica ended.", ["kind", "outcome"])
VLM_TOKENS = Counter("ratchet_vlm_tokens_total", "Tokens read and written.", ["direction"])
VLM_SECONDS = Histogram("ratchet_vlm_request_seconds", "Time to a whole answer.", ["kind"], buckets=LONG_SECONDS)
VLM_FIRST = Histogram("ratchet_vlm_first_token_seconds", "Time to the first token of a stream.", buckets=SECONDS)
VLM_RUNNING = Gauge("ratchet_vlm_running_requests", "Requests that are being answered.", multiprocess_mode="livesum")
VLM_QUEUE = Gauge(
    "ratchet_vlm_waiting_requests", "Requests that wait for a place in the batch.", multiprocess_mode="livesum"
)

# -- catalog --------------------------------------------------------------------------------------------------------
CATALOG_ROWS = _latest("ratchet_catalog_rows", "Rows embedded in the live image space.")
CATALOG_COVERAGE = _latest("ratchet_catalog_coverage_ratio", "Embedded share of the corpus, least space.")
CATALOG_DELAY = Histogram(
    "ratchet_catalog_event_to_searchable_seconds", "From ingest to searchable.", buckets=LONG_SECONDS
)
CATALOG_FRAGMENTS = _latest("ratchet_catalog_fragments", "Fragments of the live image space's table.")
CATALOG_MISSING = _latest("ratchet_catalog_missing_rows", "Rows that resident image spaces lack, in all.")
CATALOG_BACKFILL_RATE = _latest("ratchet_catalog_backfill_rows_per_second", "Rows embedded for spaces that lack some.")
CATALOG_BACKFILL_LEFT = _latest(
    "ratchet_catalog_backfill_left_seconds", "Estimate until all spaces are complete; NaN while there is none."
)
CATALOG_INDEXED = _latest("ratchet_catalog_indexed_rows", "Rows of the live image space in its index.")
CATALOG_INDEX_BYTES = _latest("ratchet_catalog_index_bytes", "Memory of the indexes of all image spaces.")
CATALOG_INDEX_USED = _latest(
    "ratchet_catalog_index_used", "1 while searches of the live image space go through its index."
)
CATALOG_INDEX_SECONDS = Histogram("ratchet_catalog_index_build_seconds", "Time to make an index.", buckets=LONG_SECONDS)
CATALOG_RECALL = _latest(
    "ratchet_catalog_recall_ratio",
    "Share of the true ten nearest rows that the index finds (recall@10), used or not: stored vectors and queries.",
)
DRIFT_FRECHET = _latest(
    "ratchet_drift_frechet_distance",
    "Squared Frechet distance of the newest samples' embeddings from those before them (unit vectors: 0 to 4).",
    ["space"],
)
DRIFT_SHIFT = _latest(
    "ratchet_drift_mean_shift",
    "Shift of the newest embeddings' mean in standard errors, root mean square over dimensions; 1 means no drift.",
    ["space"],
)


def _start(metric: Counter | Gauge | Histogram, *labels: tuple[str, ...]) -> None:
    """Create all label combinations at 0: to `increase`, a counter that appears with its first event looks as if
    nothing had happened."""
    for combination in product(*labels):
        metric.labels(*combination)


_FAMILIES = ("clip", "vlm")
for _metric in (UPDATE_STEPS, UPDATE_VISITED, UPDATE_LEFT_OUT, UPDATE_PASSED_OVER, UPDATE_SECONDS, GATE_SECONDS):
    _start(_metric, _FAMILIES)
del _metric
_start(UPDATES, _FAMILIES, ("done", "failed", "abandoned"))
_start(GATE_VERDICTS, _FAMILIES, ("passed", "rejected", "inconclusive", "kept"))
_start(BUDGET_SPENT, ("train", "gate"))
_start(INGEST_STORED, ("train", "fresh_eval"))
_start(INGEST_DUPLICATES, ("exact", "perceptual", "older"))
_start(INGEST_LOST, ("retention",))
_start(INGEST_WAITING, ("broker", "store", "registry"))
_start(MAINTAIN_RUNS, ("done", "failed"))
_start(MAINTAIN_DELETED, ("retention", "deletion"))
_start(COLLECTED, ("adapter", "carry-over", "report", "work folder", "score cache", "engine cache"))
_start(EVENTS_PUBLISHED, ("candidate", "verdict", "proposal", "release", "rollback", "deletion", "gap", "feedback"))
_start(RELEASES, ("initial", "update", "rollback", "release"), ("committed", "failed"))
_start(RELEASE_PHASE, ("prepare", "commit", "rollback"))
_start(VLM_TOKENS, ("prompt", "completion"))
_start(VLM_REQUESTS, ("reply", "stream", "score"), ("ok", "late", "ask", "adapter", "gone", "dead"))
_start(VLM_SECONDS, ("reply", "stream", "score"))
_start(HTTP_REFUSED, ("overloaded", "unavailable", "deadline_exceeded", "internal"))  # errors of our own
_start(CACHE_LOOKUPS, ("image", "text"), ("hit", "miss"))
_start(ROLLOUT_REQUESTS, ("trial", "stable"))
_start(ROLLOUT_COMPARISONS, _FAMILIES, ("agree", "differ", "failed", "dropped"))
_start(OPERATOR, ("release", "promote", "rollback", "hold", "resume"), ("done", "refused"))


def names() -> dict[str, set[str]]:
    labels_of: dict[str, set[str]] = {}
    for metric in list(globals().values()):
        if isinstance(metric, Counter):
            labels_of[f"{metric._name}_total"] = set(metric._labelnames)
        elif isinstance(metric, Gauge):
            labels_of[metric._name] = set(metric._labelnames) | (
                {"pid"} if metric._multiprocess_mode == "liveall" else set()
            )
        elif isinstance(metric, Histogram):
            labels_of[f"{metric._name}_bucket"] = {*metric._labelnames, "le"}
            labels_of[f"{metric._name}_sum"] = labels_of[f"{metric._name}_count"] = set(metric._labelnames)
    return labels_of
