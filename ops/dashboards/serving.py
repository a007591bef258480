"""Requests, queues, models, releases and the catalog."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as make

from ops.dashboards import panels
from ops.dashboards.panels import GREEN, ORANGE, RED, heat, lines, number, row
from ops.dashboards.queries import API, AVAILABILITY, latency, mean, quantile

RATE = "[$__rate_interval]"
PHASE = "sum by (phase) (ratchet_release_phase_seconds"


def dashboard() -> make.Dashboard:
    """What clients get, and where the time goes."""
    board = panels.dashboard("serving", "Serving", "What clients get, where the time goes, what a release does to it.")
    row(
        board,
        "At a glance",
        number(
            "Availability", "Share of API requests that were not answered with a 5xx, over the shown time.",
            "percentunit", (AVAILABILITY.format("[$__range]"), ""), decimals=2, trend=False, nothing="no requests",
            steps=[(None, RED), (0.99, ORANGE), (0.999, GREEN)],
        ),
        number(
            "Request rate", "API requests a second.", "reqps",
            (f"sum(rate(ratchet_http_requests_total{{{API}}}{RATE}))", ""),
        ),
        number(
            "Latency, median", "Half of the API requests are faster, first byte in to last byte out.", "s",
            (latency(0.5, "[$__range]"), ""), decimals=2, trend=False, nothing="no requests",
        ),
        number(
            "Latency, 99th percentile", "One of 100 API requests is slower.", "s",
            (latency(0.99, "[$__range]"), ""), decimals=2, trend=False, nothing="no requests",
        ),
        number(
            "In flight", "Requests that are being answered at this moment.", "none",
            ("sum(ratchet_http_in_flight_requests)", ""),
        ),
        number(
            "Waiting", "Requests that wait for a place in a batch of the encoders or of the VLM. More than a batch for "
            "long: add replicas, or expect 429.", "none",
            ("sum(ratchet_encoder_waiting_requests)", "encoders"), ("sum(ratchet_vlm_waiting_requests)", "VLM"),
        ),
    )  # fmt: skip
    row(
        board,
        "Requests",
        lines(
            "Requests by route", "API requests a second.", "reqps",
            (f"sum by (route) (rate(ratchet_http_requests_total{{{API}}}{RATE}))", "{{route}}"), stacked=True,
        ),
        lines(
            "Requests by status", "All answers a second. 429: the queue was full; 499: the client left; 504: too late; "
            "503: a model could not answer.", "reqps",
            (f"sum by (status) (rate(ratchet_http_requests_total{{{API}}}{RATE}))", "{{status}}"),
        ),
        lines(
            "Errors by code", "Error objects a second, by the `code` that the client was told. Most are the client's "
            "own; `overloaded`, `unavailable`, `deadline_exceeded` and `internal` are ours.", "reqps",
            (f"sum by (reason) (rate(ratchet_http_refused_total{RATE})) or vector(0)", "{{reason}}"),
        ),
        lines(
            "Latency by route, 95th percentile", "First byte in to last byte out; a stream of the VLM counts until its "
            "last token.", "s", (latency(0.95, RATE, "route"), "{{route}}"),
        ),
        lines(
            "Over their limit", "Requests a second that were answered 429 because their key, or their address, had "
            "made too many.", "reqps",
            (f"sum by (caller) (rate(ratchet_http_rate_limited_total{RATE})) or vector(0)", "{{caller}}"),
        ),
        lines(
            "Latency of all API requests", "Quantiles. A gap between median and tail that grows is a queue.", "s",
            (latency(0.5, RATE), "median"), (latency(0.95, RATE), "95%"), (latency(0.99, RATE), "99%"),
        ),
        heat(
            "Latency, all requests", "How many API requests took how long. A second band is a second kind of request, "
            "or a queue.", "s", f"sum by (le) (increase(ratchet_http_request_seconds_bucket{{{API}}}{RATE}))", width=24,
        ),
    )  # fmt: skip
    row(
        board,
        "Encoders",
        lines(
            "Queue", "Requests in a batch, and those that wait for one.", "none",
            ("sum(ratchet_encoder_running_requests)", "running"), ("sum(ratchet_encoder_waiting_requests)", "waiting"),
            width=6,
        ),
        lines(
            "Items of a batch, mean", "Images or texts in one forward pass. Larger batches cost less an item, and make "
            "each request wait.", "none", (mean("ratchet_encoder_batch_size", "kind"), "{{kind}}"), width=6,
        ),
        lines(
            "Time of a batch, 95th percentile", "One forward pass. It rises when the CPU is shared with learning.", "s",
            (quantile(0.95, "ratchet_encoder_batch_seconds", "kind"), "{{kind}}"), width=6,
        ),
        lines(
            "Items", "Images and texts encoded a second, those of the catalog included.", "cps",
            (f"sum by (kind) (rate(ratchet_encoder_batch_size_sum{RATE}))", "{{kind}}"), width=6,
        ),
        lines(
            "Cached", "Share of the texts and images of requests whose vector was in the cache of the ingress, so that "
            "no encoder had to compute it. It begins anew with each release that changes their tower.", "percentunit",
            (f'sum by (kind) (rate(ratchet_cache_lookups_total{{outcome="hit"}}{RATE})) '
             f"/ (sum by (kind) (rate(ratchet_cache_lookups_total{RATE})) > 0)", "{{kind}}"), width=12,
        ),
        lines(
            "Memory of the cache", "Bytes of cached vectors, over all ingress processes; `serve.cache_bytes` is the "
            "bound.", "bytes", ("sum(ratchet_cache_bytes)", "bytes"), width=12,
        ),
    )  # fmt: skip
    row(
        board,
        "Vision-language model",
        lines(
            "Queue of the VLM", "Requests that are being answered, and those that wait.", "none",
            ("sum(ratchet_vlm_running_requests)", "running"), ("sum(ratchet_vlm_waiting_requests)", "waiting"), width=6,
        ),
        lines(
            "Answers", "Requests that ended, a second. `gone`: the client left; `late`: the deadline passed; `dead`: "
            "the engine died.", "reqps", (f"sum by (outcome) (rate(ratchet_vlm_requests_total{RATE}))", "{{outcome}}"),
            width=6,
        ),
        lines(
            "Tokens", "Tokens read (prompt, images included) and written, a second.", "cps",
            (f"sum by (direction) (rate(ratchet_vlm_tokens_total{RATE}))", "{{direction}}"), width=6,
        ),
        lines(
            "Time to an answer", "Mean time to a whole answer, and to the first token of a stream.", "s",
            (mean("ratchet_vlm_request_seconds"), "whole answer"), (mean("ratchet_vlm_first_token_seconds"),
            "first token"), width=6,
        ),
    )  # fmt: skip
    row(
        board,
        "Releases",
        lines(
            "Live release by part", "The release that each part serves. They agree, but for moments.", "none",
            ("max by (part) (ratchet_release_live)", "{{part}}"), stairs=True, width=6,
        ),
        lines(
            "In flight by release", "Requests by the release that they were stamped with. After a commit, `incumbent` "
            "drains; `older` is what clients name, as `clip@N`.", "none",
            ("sum by (age) (ratchet_release_in_flight_requests)", "{{age}}"), stacked=True, width=6,
        ),
        number(
            "Time of a phase, mean", "Prepare loads the adapter and completes the catalog beside what is served; "
            "commit and rollback are the switch, and take less than a second.", "s",
            (f"{PHASE}_sum) / ({PHASE}_count) > 0)", "{{phase}}"), trend=False, width=6, decimals=2,
        ),
        number(
            "Proposals decided", "Since serving started.", "none",
            ("sum by (outcome) (ratchet_releases_total)", "{{outcome}}"), trend=False, width=6,
        ),
        lines(
            "Source of the residency", "Processes by where they know from what is resident: the ledger or, while that "
            "is away, the node's copy or the artifacts'.", "none",
            ("count by (source) (ratchet_release_residency_source == 1)", "{{source}}"), stairs=True, width=12,
        ),
        lines(
            "Live adapter cannot be loaded", "1 while an older release answers, because the files of the live adapter "
            "are gone or damaged.", "none", ("max by (family) (ratchet_release_unservable)", "{{family}}"), stairs=True,
            width=12,
        ),
        lines(
            "What answers", "1 while every ingress gets an answer from it: the CLIP, the VLM, the catalog. Each is "
            "asked every ten seconds.", "none", ("min by (part) (ratchet_serving_up)", "{{part}}"), stairs=True,
            width=24,
        ),
    )  # fmt: skip
    row(
        board,
        "Rollout and guard",
        number(
            "Watched release", "Number of the release that the guard looks at; 0: none.", "none",
            ("max(ratchet_guard_release)", ""), trend=False,
        ),
        number(
            "Share of the live release", "Share of requests that the live release answers: less than 100% while it is a"
            " canary, 0% while it is a shadow.", "percentunit", ("max(ratchet_release_share_ratio)", ""), decimals=0,
        ),
        lines(
            "Sides", "Requests a second while a canary or a shadow is live: those of the trial, and of the stable "
            "side.", "reqps", (f"sum by (side) (rate(ratchet_rollout_requests_total{RATE}))", "{{side}}"), stacked=True,
            width=4, height=4,
        ),
        lines(
            "Comparisons", "Inputs a second that both sides answered, one of them unseen.", "cps",
            (f"sum by (outcome) (rate(ratchet_rollout_comparisons_total{RATE}))", "{{outcome}}"), width=4, height=4,
        ),
        number(
            "Agreement", "Share of inputs on which the watched release and its incumbent agree.", "percentunit",
            ("min by (family) (ratchet_rollout_agreement_ratio)", "{{family}}"), nothing="nothing compared", decimals=0,
        ),
        number(
            "Ended by the guard", "Releases that the guard promoted or took back since serving started. "
            "`ratchet audit` has its evidence.", "none",
            ("sum by (decision, guardrail) (ratchet_guard_decisions_total) or vector(0)",
             "{{decision}} {{guardrail}}"), trend=False,
        ),
    )  # fmt: skip
    row(
        board,
        "Catalog",
        number(
            "Coverage", "Embedded share of the corpus, in the least complete resident space.", "percentunit",
            ("min(ratchet_catalog_coverage_ratio)", ""), steps=[(None, RED), (0.9, ORANGE), (0.999, GREEN)],
        ),
        number(
            "Recall at 10", "Share of the true ten nearest rows that the index finds, for stored vectors and the last "
            "queries. Below catalog.min_recall it is not used; a small catalog has none, and 100%.", "percentunit",
            ("min(ratchet_catalog_recall_ratio)", ""), steps=[(None, RED), (0.9, ORANGE), (0.95, GREEN)],
            nothing="no rows",
        ),
        number("Rows", "Rows of the live image space.", "short", ("max(ratchet_catalog_rows)", "")),
        number(
            "Backfill", "Estimate until every resident image space has every row.", "s",
            ("max(ratchet_catalog_backfill_left_seconds)", ""), nothing="no estimate",
        ),
        lines(
            "Backfill, rows a second", "How fast missing rows are embedded, beside the requests.", "cps",
            ("sum(ratchet_catalog_backfill_rows_per_second)", "rows"), height=4,
        ),
        number(
            "Index in use", "Whether searches go through the index: not where the catalog is small, and not while it "
            "finds too little.", "none", ("max(ratchet_catalog_index_used)", ""),
            words={"0": ("exact", ORANGE), "1": ("index", GREEN)}, trend=False,
        ),
        lines(
            "Making indexes", "Time spent on it, at low priority.", "s",
            ("sum(increase(ratchet_catalog_index_build_seconds_sum[$__range]))", "indexes"), height=4,
        ),
        lines(
            "Missing and indexed", "Rows that image spaces lack; and of the live one, rows in its index.", "short",
            ("max(ratchet_catalog_missing_rows)", "missing"), ("max(ratchet_catalog_indexed_rows)", "indexed"),
            height=4,
        ),
        number(
            "Memory of indexes", "Of all image spaces. Their vectors are coded so that it stays below "
            "catalog.cache_gib.", "bytes",
            ("max(ratchet_catalog_index_bytes)", ""),
        ),
        number(
            "Fragments", "Data files of its table. Thousands make every scan slow; each 32nd merge compacts.", "none",
            ("max(ratchet_catalog_fragments)", ""), steps=[(None, GREEN), (200, ORANGE), (1000, RED)],
        ),
        lines(
            "From ingest to searchable, mean", "Time until a new sample is found by search.", "s",
            (mean("ratchet_catalog_event_to_searchable_seconds", window="[$__range]"), "mean"), height=4,
        ),
    )  # fmt: skip
    return board
