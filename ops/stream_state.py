"""State of the stream for command line and console: losses, unavailable dependencies, maintenance. Lasting facts come
from the sample store, deletions from the ledger. Current activity comes from the metrics of ingest and maintenance on
this machine; it is None where they cannot be reached, as from another container."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from core.addresses import local_url
from core.metrics import NAME_PREFIXES
from core.metrics.exposition import SHARED
from core.settings import Settings
from streams.store.rows import HELD, SPLITS

if TYPE_CHECKING:
    from core.ledger import Ledger
    from streams.store.sample_store import SampleStore

SCRAPE_SECONDS: Final = 1.0
GAPS: Final = 5
RECENT: Final = timedelta(days=1)
"""Time for which a loss is reported as a problem, and that a deletion may take."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets that were gone before they were read."""

    partition: str
    first: int
    last: int
    reason: str
    """``retention`` or ``skipped``; ``truncated`` in rows stored by earlier versions."""
    time: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> Gap:
        place = f"{row['topic']}:{row['partition']}"
        return cls(place, row["offset"], row["until"] - 1, row["reason"], row["ingested_at"])

    @property
    def shown(self) -> str:
        return f"{self.partition} {self.first}..{self.last} ({self.reason})"


@dataclass(frozen=True, slots=True)
class StreamState:
    samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    """By split."""
    records: int = 0
    """Records that ingest consumed, including duplicates and quarantined ones."""
    offsets: dict[str, int] = field(default_factory=dict)
    fragments: int = 0
    lost: int = 0
    gaps: tuple[Gap, ...] = ()
    """The newest, newest first."""
    rewritten: int = 0
    """Total of offsets that were cut off the log after they were stored."""
    waiting_for: str | None = None
    """Dependency that ingest waits for; empty: none; None: unknown."""
    quarantine_failing: bool = False
    waiting_state: str = ""
    """State of the dependency that ingest waits for: a value of :data:`core.dependencies.State`."""
    maintained: datetime | None = None
    """End of the last completed maintenance run; None: unknown, or none yet."""
    maintenance_failing: bool = False
    maintenance_known: bool = False
    deletions: int = 0
    oldest_deletion: timedelta = timedelta(0)

    @property
    def held(self) -> int:
        """Samples that wait for an operator to accept them."""
        return sum(count for split, count in self.samples.items() if split.startswith(HELD))

    def problems(self) -> list[str]:
        problems = []
        if self.waiting_for:
            problems.append(f"Ingest waits for the {self.waiting_for}: {self.waiting_state}.")
        if self.quarantine_failing:
            problems.append("Refused records cannot be published to the quarantine topic; the log of ingest says why.")
        if self.gaps and datetime.now(UTC) - self.gaps[0].time < RECENT:
            problems.append(f"Records were lost before they were read: {self.gaps[0].shown}.")
        if self.maintenance_failing:
            problems.append("The last run of maintenance failed.")
        if self.oldest_deletion > RECENT:
            problems.append("A deletion is not complete after a day.")
        return problems


def stream_state(settings: Settings, store: SampleStore, ledger: Ledger) -> StreamState:
    """Read the state from store, ledger and the metrics of this machine. Raises StoreError, LedgerError."""
    tally = store.tally()
    ingest, maintain = scrape(settings, "ingest"), scrape(settings, "maintain")
    done, failed = (maintain.get(f"ratchet_maintain_last_run_timestamp_seconds {how}") for how in ("done", "failed"))
    oldest = ledger.oldest_deletion()
    waiting_for = _labelled(ingest, "ratchet_ingest_waiting")
    return StreamState(
        samples={split: tally[split] for split in SPLITS},
        records=sum(tally[kind] for kind in ("sample", "duplicate", "quarantine", "tombstone", "deleted")),
        offsets=store.offsets(),
        fragments=store.fragments(),
        lost=tally["gap_offsets"],
        gaps=tuple(map(Gap.of, store.gaps(GAPS))) if tally["gap_offsets"] else (),
        rewritten=tally["rewritten_offsets"],
        waiting_for=waiting_for,
        waiting_state=_labelled(ingest, f"ratchet_dependency_state {waiting_for}") or "",
        quarantine_failing=ingest.get("ratchet_ingest_quarantine_failing") == 1.0,
        maintained=None if done is None else datetime.fromtimestamp(done, UTC),
        maintenance_failing=failed is not None and failed > (done or 0.0),
        maintenance_known=bool(maintain),
        deletions=0 if oldest is None else ledger.count_deletions(states=["requested", "removed", "held"]),
        oldest_deletion=timedelta(0) if oldest is None else datetime.now(UTC) - oldest.requested_at,
    )


def scrape(settings: Settings, part: Literal["ingest", "maintain"]) -> dict[str, float]:
    """Ratchet's metrics of a part on this machine, by name, followed by a space and the values of labels if there are
    any. Empty if it does not answer."""
    port = settings.ingest.metrics_port if part == "ingest" else settings.maintain.metrics_port
    if not port:
        return {}
    try:
        url = f"{local_url(settings.metrics_host, port)}/metrics"
        page = httpx.get(url, timeout=SCRAPE_SECONDS, trust_env=False).raise_for_status().text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    except (httpx.HTTPError, ValueError):
        return {}
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for sample in samples
        if sample.name.startswith((*NAME_PREFIXES[part], *SHARED))
    }


def _labelled(metrics: dict[str, float], name: str) -> str | None:
    """The label of a metric whose value is not 0; empty if all are 0, None without such a metric."""
    values = {key.removeprefix(f"{name} "): value for key, value in metrics.items() if key.startswith(f"{name} ")}
    return next((label for label, value in values.items() if value), "") if values else None
