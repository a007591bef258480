"""``ratchet bench variety``: is any distinct record lost, and does any stream of one kind stop learning?

Each kind of :mod:`benchmarks.variety.kinds` is published by the client's producer to an embedded broker, and stored and
split by ingest. Then a small random CLIP, and one of each family of VLMs, learn from each kind in an update.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.variety.kinds import KINDS, samples
from benchmarks.variety.updates import MODELS
from core.errors import ConfigError, StoreUnavailable
from core.progress import progress_log, step
from core.settings import Settings
from ratchet_client import Limits, Producer
from ratchet_client.producer import Delivery
from streams.ingest.consumer import Consumer
from streams.kafka.broker import EmbeddedBroker
from streams.store.sample_store import SampleStore

RECORDS: Final = 300
STORED_SECONDS: Final = 300.0
"""When no further record is stored for this long, missing ones count as lost."""
UPDATE_SECONDS: Final = 300.0
"""An update without output for this long is stuck."""


def run(
    settings: Settings, kinds: Sequence[str] = tuple(KINDS), records: int = RECORDS, models: Sequence[str] = MODELS
) -> dict[str, Any]:
    """Publish, store, split and learn. Returns the figures.

    Args:
        records: of each kind.
        models: ``CLIP`` and families of VLMs.

    Raises RatchetError if the broker or the store does not work.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        home = Path(folder)
        ours = settings.model_copy(update={
            "home": home, "lake_url": None,
            "ingest": settings.ingest.model_copy(update={"min_side": 1}),
        })  # fmt: skip
        store = SampleStore(ours.lake)
        stored = {row["kind"]: row for row in take_in(ours, store, kinds, records)}
        learned = {name: learn(name, ours.lake, kinds) for name in models}
    problems = {
        f"{name}, {each['kind']}": each["problem"]
        for name, rows in learned.items()
        for each in rows
        if "problem" in each
    }
    shares = [row["held_out_share"] for row in stored.values()]
    return {
        "kinds": len(kinds),
        "records": records,
        "lost": sum(row["lost"] for row in stored.values()),
        "dropped_different": sum(row["dropped"] for row in stored.values()),
        "held_out_share_min": min(shares),
        "held_out_share_max": max(shares),
        "updates": sum(len(rows) for rows in learned.values()),
        "updates_stuck": sum(each.get("stuck", False) for rows in learned.values() for each in rows),
        "families_failed": sum(any("problem" in each for each in rows) for rows in learned.values()),
        "by_kind": list(stored.values()),
        "problems": problems,
        "machine": machine(),
    }


def take_in(settings: Settings, store: SampleStore, kinds: Sequence[str], records: int) -> list[dict[str, Any]]:
    """Publish this many records of each kind and return the results by kind."""
    with EmbeddedBroker() as broker:
        kafka = settings.kafka.model_copy(update={"bootstrap": broker.address, "batch_seconds": 0.5})
        ours = settings.model_copy(update={"kafka": kafka})
        places: dict[str, list[Delivery]] = {}
        with reading(ours) as ingest:
            limits = Limits(min_side=1)
            with Producer(broker.address, kafka.topic, limits=limits) as producer:
                for kind in kinds:
                    with step(f"publishing {kind}"):
                        sent = [producer.send(each) for each in samples(kind, records)]
                        places[kind] = [each.result(STORED_SECONDS) for each in sent]
            with step("waiting for ingest"):
                _wait(ingest, len(kinds) * records)
    outcomes = {(row["topic"], row["partition"], row["offset"]): row["kind"] for row in store.records().to_pylist()}
    splits = store.scan(columns=["domain", "split"]).to_pylist()
    held = Counter((row["domain"], row["split"]) for row in splits)
    rows = []
    for kind, delivered in places.items():
        became = Counter(outcomes.get((each.topic, each.partition, each.offset), "lost") for each in delivered)
        share = held[kind, "fresh_eval"] / max(1, became["sample"])
        rows.append({
            "kind": kind, "stored": became["sample"], "lost": became["lost"],
            "dropped": became["duplicate"] + became["quarantine"], "held_out_share": round(share, 3),
        })  # fmt: skip
    return rows


def learn(name: str, lake: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(found) < len(kinds):
        left = kinds[len(found) :]
        with step(f"updates of {name}: {len(left)} kinds"):
            rows, ended = _lines([sys.executable, "-m", "benchmarks.variety.updates", name, lake, *left])
        found += rows
        if rows and rows[-1]["kind"] is None:  # the model cannot be opened
            break
        if len(rows) < len(left):
            found.append({"kind": left[len(rows)], "stuck": True, "problem": ended})
    for each in found:
        if "problem" in each:
            progress_log.error(f"{name}, {each['kind']}: {each['problem']}")
    return found


def _lines(command: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Output lines of a process until it ends or is silent for too long, and how it ended."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(UPDATE_SECONDS, process.kill)
        assert process.stdout is not None
        try:
            timer.start()
            for line in process.stdout:
                if not line.startswith("{"):
                    continue  # of a library
                timer.cancel()
                rows.append(json.loads(line))
                timer = threading.Timer(UPDATE_SECONDS, process.kill)
                timer.start()
        finally:
            timer.cancel()
            process.kill()
            status = process.wait()
        errors.seek(0)
        return rows, f"exit status {status}: {errors.read()[-300:]}"


@contextmanager
def reading(settings: Settings) -> Iterator[Consumer]:
    ingest = Consumer(settings, processes=2)
    thread = threading.Thread(target=ingest.run, name="ingest")
    thread.start()
    try:
        yield ingest
    finally:
        ingest.stop()
        thread.join(60)


def _wait(ingest: Consumer, records: int) -> None:
    seen, since = -1, time.monotonic()
    while seen < records:
        now = ingest.status.samples + ingest.status.duplicates + ingest.status.quarantined
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > STORED_SECONDS:
            raise StoreUnavailable(f"ingest stored {seen} of {records} records, and then none for a while.")
        time.sleep(0.2)


def show(figures: dict[str, Any]) -> None:
    table = Table("kind", "stored", "lost", "dropped", "held out", "updates that failed", title="Streams of one kind")
    for row in figures["by_kind"]:
        failed = [place.split(",")[0] for place in figures["problems"] if place.endswith(f", {row['kind']}")]
        share = f"{100 * row['held_out_share']:.1f}%"
        table.add_row(
            row["kind"], *(str(row[name]) for name in ("stored", "lost", "dropped")), share, ", ".join(failed)
        )
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("variety", __doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--records", type=int, default=RECORDS, help=f"of each kind ({RECORDS})")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)} (all)")
    chosen = parser.parse_args(arguments)
    for name, known in ((chosen.kinds, KINDS), (chosen.models, MODELS)):
        if unknown := [each for each in name if each not in known]:
            raise ConfigError(f"there is no {unknown[0]!r}.", f"There are: {', '.join(known)}.")
    show(run(settings, chosen.kinds, chosen.records, chosen.models))
