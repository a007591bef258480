"""Is it healthy, what is live, is it learning, what does it cost: one row each."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as make

from ops.dashboards import panels
from ops.dashboards.panels import GREEN, GREY, ORANGE, RED, lines, number, row
from ops.dashboards.queries import API, AVAILABILITY, DISAGREE, GAIN, LAG, QUARANTINED_SHARE, latency

DAY = "[1d]"


def dashboard() -> make.Dashboard:
    """The page that an operator opens first."""
    board = panels.dashboard("overview", "Overview", "Is it healthy, what is live, is it learning, what does it cost?")
    row(
        board,
        "Is it healthy?",
        number(
            "Availability", "Share of API requests that were not answered with a 5xx, over the shown time. "
            "Below 99.9%: see Serving, requests by status.", "percentunit", (AVAILABILITY.format("[$__range]"), ""),
            steps=[(None, RED), (0.99, ORANGE), (0.999, GREEN)], nothing="no requests", decimals=2, trend=False,
            width=3,
        ),
        number(
            "Latency, 95th percentile", "19 of 20 API requests are faster than this, first byte in to last byte out, "
            "answers of the VLM included. Rising: see Serving, queues and batches.", "s",
            (latency(0.95, "[$__range]"), ""), nothing="no requests", decimals=2, trend=False, width=3,
        ),
        number(
            "Replicas agree", "Whether all replicas serve the same release. During a commit they differ for moments; "
            "for minutes they must not.", "none", (DISAGREE, ""), words={"0": ("yes", GREEN)},
            steps=[(None, GREEN), (1, RED)], trend=False, width=3,
        ),
        number(
            "Records behind", "Records in the topic that ingest has not stored. Rising for minutes: ingest is too slow,"
            " or away; see Stream.", "short", (LAG, ""), steps=[(None, GREEN), (1_000, ORANGE), (10_000, RED)], width=3,
        ),
        number(
            "Quarantined", "Share of records that were refused in the shown time. Above some percent: see Stream, why.",
            "percentunit", (QUARANTINED_SHARE, ""), steps=[(None, GREEN), (0.01, ORANGE), (0.05, RED)], decimals=1,
            nothing="no records", trend=False, width=3,
        ),
        number(
            "Catalog coverage", "Embedded share of the corpus, in the least complete resident space. Below 100% for "
            "long: search misses new samples, and a release waits.", "percentunit",
            ("min(ratchet_catalog_coverage_ratio)", ""), steps=[(None, RED), (0.9, ORANGE), (0.999, GREEN)], width=3,
        ),
        number(
            "Processes", "Processes that run, by part. Every part has one at least.", "none",
            ("sum by (part) (ratchet_build_info)", "{{part}}"), trend=False, width=6,
        ),
        lines(
            "Requests", "API requests a second, and those that were answered with a 5xx.", "reqps",
            (f"sum(rate(ratchet_http_requests_total{{{API}}}[$__rate_interval]))", "all"),
            (f'sum(rate(ratchet_http_requests_total{{{API}, status=~"5.."}}[$__rate_interval])) or vector(0)', "5xx"),
            width=12, height=6,
        ),
        lines(
            "Latency", "Quantiles over all API requests.", "s", (latency(0.5, "[$__rate_interval]"), "median"),
            (latency(0.95, "[$__rate_interval]"), "95%"), width=12, height=6,
        ),
    )  # fmt: skip
    row(
        board,
        "What is live?",
        number(
            "Live release", "Number of the release that answers. `ratchet releases show N` tells what is in it.",
            "none", ('max(ratchet_release_live{part="controller"})', ""), trend=False,
        ),
        number(
            "Live since", "When it was committed.", "dateTimeFromNow",
            ("1000 * max(ratchet_release_committed_timestamp_seconds)", ""), trend=False,
        ),
        number(
            "Updates", "On hold, updates that passed the gate wait for `ratchet releases resume`.", "none",
            ("max(ratchet_release_held)", ""), words={"0": ("released", GREEN), "1": ("on hold", ORANGE)}, trend=False,
        ),
        number(
            "Open proposals", "Proposals that wait, or are being prepared. More than a few minutes: the controller or "
            "a replica is in trouble, or updates are on hold.", "none", ("max(ratchet_release_proposals)", ""),
        ),
        number(
            "Operator actions", "What operators did in the shown time. `ratchet audit` says who, and why.", "none",
            ('round(sum by (action) (increase(ratchet_operator_actions_total{outcome="done"}[$__range])))',
             "{{action}}"), trend=False,
        ),
        number(
            "Version", "Which version of Ratchet runs; two are shown while it is being rolled out.", "none",
            ("count by (version) (ratchet_build_info)", "{{version}}"), names=True,
        ),
        lines(
            "Releases over time", "The live release as each part sees it. The lines lie on each other, but for "
            "moments.", "none", ("max by (part) (ratchet_release_live)", "{{part}}"), stairs=True, width=24, height=6,
        ),
    )  # fmt: skip
    row(
        board,
        "Is it learning?",
        number(
            "Gained", "Mean gain of the live adapters over the base on new data that was never trained on, when they "
            "were judged. 0: the base itself is live.", "percentunit", (GAIN, "{{family}}"), decimals=1,
            steps=[(None, RED), (-0.001, GREY), (0.001, GREEN)], nothing="never judged", trend=False,
        ),
        number(
            "Forgotten", "Mean loss to the base on the retention suites. The gate bounds it; above a few points look "
            "at Learning, suite by suite.", "percentunit", ("max by (family) (ratchet_release_forgetting_ratio)",
            "{{family}}"), decimals=1, steps=[(None, GREEN), (0.02, ORANGE), (0.05, RED)], nothing="never judged",
            trend=False,
        ),
        number(
            "Verdicts of a day", "What the gate said in the last 24 hours.", "none",
            (f"round(sum by (outcome) (increase(ratchet_gate_verdicts_total{DAY})))", "{{outcome}}"), trend=False,
        ),
        number(
            "The trainer", "What it does now for each model.", "none",
            ("max by (family, state) (ratchet_update_state) == 1", "{{family}}: {{state}}"), names=True,
        ),
        number(
            "New samples", "Samples that no update has learned or tried; `updater.min_new_samples` begin one.", "short",
            ("max by (family) (ratchet_update_new_samples)", "{{family}}"),
        ),
        number(
            "Drift", "How far the newest samples are from those before them, in standard errors. About 1 is no drift; "
            "see Stream.", "none", ("max(ratchet_drift_mean_shift)", ""), decimals=1, nothing="too few samples",
            steps=[(None, GREEN), (1.5, ORANGE), (2.5, RED)],
        ),
    )  # fmt: skip
    row(
        board,
        "What does it cost?",
        number(
            "Budget left", "Share of the token bucket that is left. Without enough for an update, the updater waits "
            "for the refill.", "percentunit", ("max(ratchet_budget_level_flops) / max(ratchet_budget_size_flops)", ""),
            steps=[(None, RED), (0.05, ORANGE), (0.2, GREEN)], decimals=0, width=5,
        ),
        number(
            "Spent in a day", "Memory-adjusted FLOPs of the last 24 hours.", "si:FLOP",
            (f"sum by (purpose) (increase(ratchet_budget_spent_flops_total{DAY}))", "{{purpose}}"), trend=False,
            width=5,
        ),
        number(
            "Last update", "Memory-adjusted FLOPs that the last update of each model spent.", "si:FLOP",
            ("max by (family) (ratchet_update_spent_flops)", "{{family}}"), trend=False, nothing="none yet",
            width=5,
        ),
        number(
            "Time learning", "Time spent training and judging in the last 24 hours.", "s",
            (f"sum(increase(ratchet_update_seconds_sum{DAY}))", "training"),
            (f"sum(increase(ratchet_gate_seconds_sum{DAY}))", "judging"), trend=False, width=5,
        ),
        number(
            "Sample store", "Bytes of the newest version of the sample store.", "bytes",
            ("max(ratchet_store_bytes)", ""), width=4,
        ),
    )  # fmt: skip
    return board
