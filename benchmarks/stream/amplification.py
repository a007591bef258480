"""Write amplification: bytes that maintenance writes for each byte that ingest stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.stream.filling import sample_rows
from core.progress import track
from core.settings import Settings
from core.settings.streams import Kafka
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.writer import StoreWriter

STREAM = "committed"
WATCHED = ("data", "_indices", "_deletions")


@dataclass(frozen=True, slots=True)
class Amplification:
    rows: int
    commit_rows: int
    commits_a_run: int
    ingested: int
    """Bytes of the data files of all commits."""
    data: int
    """Bytes of data files that maintenance wrote."""
    indexes: int
    fragments: int

    @property
    def ratio(self) -> float:
        return (self.data + self.indexes) / self.ingested


def measure(home: Path, rows: int, commit_rows: int, commits_a_run: int, image_bytes: int) -> Amplification:
    """Commit ``rows`` samples, with maintenance in between."""
    home.mkdir(parents=True, exist_ok=True)
    maintainer = Maintainer(Settings(home=home, kafka=Kafka(events_topic="")))
    store = maintainer.store
    writer = StoreWriter(store.table)
    [claim] = writer.claim([Position(STREAM, 0, 0)])
    folder = Path(store.url)
    ingested, data, indexes = 0, 0, 0
    starts = range(0, rows, commit_rows)
    for number, start in enumerate(track(starts, f"commits of {commit_rows} rows"), 1):
        before = _sizes(folder)
        end = min(start + commit_rows, rows)
        table, tally = sample_rows(STREAM, start, end, image_bytes)
        position = claim.position
        writer.commit(table, [(claim, replace(position, next=end, published=end, tally=position.tally + tally))])
        ingested += sum(_new(folder, before).values())
        if number % commits_a_run == 0:
            before = _sizes(folder)
            maintainer.run_once()
            written = _new(folder, before)
            data += written.pop("data", 0)
            indexes += sum(written.values())
    maintainer.close()
    return Amplification(rows, commit_rows, commits_a_run, ingested, data, indexes, store.fragments())


def _sizes(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_size
        for kind in WATCHED
        for path in (folder / kind).glob("**/*")
        if path.is_file()
    }  # fmt: skip


def _new(folder: Path, before: dict[Path, int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for path, size in _sizes(folder).items():
        if path not in before:
            kind = path.relative_to(folder).parts[0]
            totals[kind] = totals.get(kind, 0) + size
    return totals
