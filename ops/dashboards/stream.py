"""From the topic into the sample store, and what kind of data comes."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as make

from core.metrics.stream import STATES
from ops.dashboards import panels
from ops.dashboards.panels import GREEN, ORANGE, RED, lines, number, row, states
from ops.dashboards.queries import LAG, QUARANTINED_SHARE, mean, quantile

RATE = "[$__rate_interval]"
_STATE_NUMBERS = " or ".join(f'{n} * ratchet_dependency_state{{state="{state}"}}' for n, state in enumerate(STATES))


def dashboard() -> make.Dashboard:
    """What comes in, what becomes of it, and how it differs from before."""
    board = panels.dashboard("stream", "Stream", "What comes in, what becomes of it, and how it differs from before.")
    row(
        board,
        "At a glance",
        number(
            "Broker", "Whether every part finds the broker well. Else ingest waits, and reads on where it was.", "none",
            ('min(ratchet_dependency_state{dependency="broker", state="ok"})', ""),
            words={"1": ("ok", GREEN), "0": ("see below", RED)}, trend=False, width=3,
        ),
        number(
            "Ingest", "Whether ingest reads, or waits for something (see below). It reads on by itself.", "none",
            ("max(ratchet_ingest_waiting)", ""), words={"0": ("reads", GREEN), "1": ("waits", RED)}, trend=False,
            width=3,
        ),
        number(
            "Offsets lost", "Offsets of the shown time that were gone before they were read: deleted by the topic's "
            "retention. `ratchet status` names the gaps.", "short",
            ("sum(increase(ratchet_ingest_lost_offsets_total[$__range]))", ""), trend=False, decimals=0,
            steps=[(None, GREEN), (0.5, RED)], width=3,
        ),
        number(
            "Records behind", "Records in the topic that are not stored yet.", "short", (LAG, ""),
            steps=[(None, GREEN), (1_000, ORANGE), (10_000, RED)], width=3,
        ),
        number(
            "Records", "Records a second that ingest decided about.", "cps",
            (f"sum(rate(ratchet_ingest_records_total{RATE}))", ""), width=3,
        ),
        number(
            "Quarantined", "Share of records that were refused, over the shown time. Above some percent a producer is "
            "broken: see the reasons below.", "percentunit", (QUARANTINED_SHARE, ""), trend=False, decimals=1,
            steps=[(None, GREEN), (0.01, ORANGE), (0.05, RED)], nothing="no records", width=3,
        ),
        number(
            "Samples", "Samples in the store. `fresh_eval` is never trained on: it shows what an update gains.",
            "short", ("max by (split) (ratchet_store_samples)", "{{split}}"), width=3,
        ),
        number(
            "Drift", "Shift of the newest samples' mean embedding in standard errors. About 1 is no drift.", "none",
            ("max(ratchet_drift_mean_shift)", ""), decimals=1, nothing="too few samples",
            steps=[(None, GREEN), (1.5, ORANGE), (2.5, RED)], width=3,
        ),
    )  # fmt: skip
    row(
        board,
        "What comes in",
        lines(
            "What becomes of records", "Records a second: stored by split, known already, or refused; samples that "
            "were corrected.", "cps",
            (f"sum by (split) (rate(ratchet_ingest_samples_total{RATE}))", "stored, {{split}}"),
            (f"sum by (kind) (rate(ratchet_ingest_duplicates_total{RATE}))", "duplicate, {{kind}}"),
            (f"sum(rate(ratchet_ingest_corrected_total{RATE}))", "corrected"),
            (f"sum(rate(ratchet_ingest_quarantined_total{RATE})) or vector(0)", "quarantined"), stacked=True,
        ),
        lines(
            "Quarantined by reason", "Refused records a second. They are kept: fix the producer and publish them "
            "again.", "cps",
            (f"sum by (reason) (rate(ratchet_ingest_quarantined_total{RATE})) or vector(0)", "{{reason}}"),
        ),
        lines(
            "Bytes", "Bytes a second of the records.", "Bps", (f"sum(rate(ratchet_ingest_bytes_total{RATE}))", "read"),
        ),
        lines(
            "Behind by partition", "One partition that is behind alone: its records are slow to decode, or its process "
            "hangs.", "short", ("max by (partition) (ratchet_ingest_lag_records)", "{{partition}}"), least=0,
        ),
        lines(
            "Offsets lost over time", "Offsets an hour that were gone before they were read: keep records in the topic "
            "for longer than ingest may be away. Rewritten: cut off the log by an unclean leader election after they "
            "were stored, which loses nothing here.", "none",
            ("sum by (reason) (increase(ratchet_ingest_lost_offsets_total[1h]))", "{{reason}}"),
            ("sum(increase(ratchet_ingest_rewritten_offsets_total[1h]))", "rewritten"), least=0,
        ),
        states(
            "Quarantine", "Whether refused records get into their topic. Reading goes on without it; the log of "
            "ingest says why they do not.", "none", ("max(ratchet_ingest_quarantine_failing)", "quarantine"),
            words={"0": ("published", GREEN), "1": ("fails", RED)}, width=8,
        ),
        states(
            "What ingest waits for", "Broker, store or schema registry. Records stay in the topic meanwhile.",
            "none", ("max by (for) (ratchet_ingest_waiting)", "{{for}}"),
            words={"0": ("no", GREEN), "1": ("waits", RED)}, width=8,
        ),
        states(
            "Dependencies", "What some part finds away, slow, full, or refusing; `ratchet doctor` says why.",
            "none",
            (f"max by (dependency) ({_STATE_NUMBERS})", "{{dependency}}"),
            words={str(n): (state, RED if n else GREEN) for n, state in enumerate(STATES)},
            width=8,
        ),
        lines(
            "Time of a commit", "One atomic commit of samples, decisions and offsets. It grows with fragments and with "
            "a slow disk.", "s", (mean("ratchet_ingest_commit_seconds"), "mean"),
            (quantile(0.95, "ratchet_ingest_commit_seconds"), "95%"),
        ),
        lines(
            "From ingest to searchable", "Until a new sample is found by search.", "s",
            (mean("ratchet_catalog_event_to_searchable_seconds"), "mean"),
            (quantile(0.95, "ratchet_catalog_event_to_searchable_seconds"), "95%"),
        ),
    )  # fmt: skip
    row(
        board,
        "Sample store",
        lines(
            "Samples over time", "Samples in the store by split; both grow with the stream.", "short",
            ("max by (split) (ratchet_store_samples)", "{{split}}"), stacked=True,
        ),
        lines("Bytes of the store", "Data files of its newest version.", "bytes", ("max(ratchet_store_bytes)", "bytes"),
              least=0),
        lines(
            "Fragments", "Data files. Maintenance puts small ones together: a saw's teeth are healthy, a steep slope "
            "is not.",
            "none", ("max(ratchet_store_fragments)", "sample store"), ("max(ratchet_catalog_fragments)", "catalog"),
            least=0,
        ),
    )  # fmt: skip
    row(
        board,
        "Maintenance",
        number(
            "Last run", "Since the last run of maintenance that came to its end; one begins every `maintain.seconds`.",
            "s",
            ('time() - max(ratchet_maintain_last_run_timestamp_seconds{outcome="done"})', ""), nothing="none yet",
            steps=[(None, GREEN), (600, ORANGE), (1800, RED)], trend=False, width=6,
        ),
        number(
            "Versions kept", "Versions of the sample store: those of the last `maintain.keep_seconds`, and those that "
            "an update is pinned to.", "none", ("max(ratchet_maintain_versions)", ""), width=6,
        ),
        number(
            "Deletions waiting", "Deletions that were asked for and are not complete.", "none",
            ("max(ratchet_deletions_waiting)", ""), width=6,
        ),
        number(
            "Oldest deletion", "Age of the oldest deletion that is not complete; a day is promised.", "s",
            ("max(ratchet_deletion_oldest_seconds)", ""), width=6,
            steps=[(None, GREEN), (43_200, ORANGE), (86_400, RED)],
        ),
        lines(
            "Runs", "Runs of maintenance an hour. Failed ones: see its log.", "none",
            ("sum by (outcome) (increase(ratchet_maintain_runs_total[1h]))", "{{outcome}}"), least=0,
        ),
        lines(
            "Time of a run", "Compaction, clean-up, retention and deletion together.", "s",
            (mean("ratchet_maintain_seconds"), "mean"), (quantile(0.95, "ratchet_maintain_seconds"), "95%"),
        ),
        lines(
            "Written anew", "Bytes a second that compaction and deletion write, beside what comes in. Several times "
            "what comes in, for long: too much is rewritten.", "Bps",
            (f"sum(rate(ratchet_maintain_written_bytes_total{RATE}))", "maintenance"),
            (f"sum(rate(ratchet_ingest_bytes_total{RATE}))", "ingest"), least=0,
        ),
        lines(
            "Samples removed", "Samples an hour that left the store, by reason; of samples that two workers stored at "
            "once, one is taken out again.", "none",
            ("sum by (reason) (increase(ratchet_maintain_deleted_samples_total[1h]))", "{{reason}}"),
            ("sum(increase(ratchet_store_doubles_settled_total[1h]))", "stored twice"), width=12, least=0,
        ),
        lines(
            "Garbage collected", "Bytes a day that the garbage collector deleted, by what it was: adapters, their "
            "carry-over, gate reports, caches.", "bytes",
            ("sum by (kind) (increase(ratchet_maintain_collected_bytes_total[1d]))", "{{kind}}"), width=12, least=0,
        ),
    )  # fmt: skip
    row(
        board,
        "Events for others",
        lines(
            "Events", "Events an hour that were put into the events topic, by type: what others are told.", "none",
            ("sum by (type) (increase(ratchet_events_published_total[1h]))", "{{type}}"), width=12,
        ),
        lines(
            "Events that wait", "Events that are not in the topic yet. Above 0 for minutes: no process publishes them, "
            "or the broker is away.", "none", ("max(ratchet_events_waiting)", "waiting"), least=0, width=12,
        ),
    )  # fmt: skip
    row(
        board,
        "Drift of what comes in",
        lines(
            "Mean shift", "Embeddings of the newest samples against those right before them: shift of the mean in "
            "standard errors. 1 is no drift; another kind of pictures is above 2.5. It falls again when the new "
            "data has become the usual data.", "none", ("max by (space) (ratchet_drift_mean_shift)", "{{space}}"),
            least=0, most=3, steps=[(None, GREEN), (2.5, RED)], width=12,
        ),
        lines(
            "Fréchet distance", "The same windows: squared distance of two normal distributions, spread included. In "
            "units of the embedding; compare it with its own past.", "none",
            ("max by (space) (ratchet_drift_frechet_distance)", "{{space}}"), least=0, width=12,
        ),
    )  # fmt: skip
    return board
