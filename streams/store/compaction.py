"""Keeping the sample store compact, beside the workers that write it.

Fragments grow in tiers, as in a log-structured merge tree: the small ones that commits leave are merged when together
they fill a medium one, and those when they fill a large one, which is never rewritten but for deletions. So each byte
is written three times more after its commit at most, whatever the store holds, and the number of fragments stays small.

Indexes cover what is compacted: the id, the key, the offset and the kind of a row. Each run adds what is new as an
index of its own; those are merged when there are many.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from lance.commit import CommitConflictError

from core.errors import StoreUnavailable
from streams.store.sample_store import SampleStore
from streams.store.table import fences, outage
from streams.store.writer import StoreWriter

log = logging.getLogger(__name__)
FULL_ROWS: Final = 65_536
FULL_BYTES: Final = 256 << 20
"""A fragment of this size is full: at ten million samples of 20 KB there are 800 of them, and each version's manifest
takes 200 KB."""
TIERS: Final = (1 / 512, 1 / 16, 1.0)
"""Sizes, as shares of a full fragment, at which smaller ones are merged. The first is for streams that
bring a few records with each commit."""
MANY: Final = 64
"""So many fragments below the first tier are merged whatever their size."""
HOLES: Final = 0.5
"""Share of deleted rows from which on a fragment is written anew for the space that this frees."""
INDEXES: Final = {
    "by_id": ("id", "BTREE"), "by_key": ("key", "BTREE"), "by_offset": ("offset", "ZONEMAP"),
    "by_kind": ("kind", "BITMAP"),
}  # fmt: skip
MOST_DELTAS: Final = 8
ROWS_AT_ONCE: Final = 64
"""Rows in memory while a fragment is rewritten: at 8 MiB an image, half a gibibyte at most."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """What planning needs to know of a data file."""

    id: int
    rows: int
    """Deleted ones included."""
    size: int
    deleted: int
    """Rows of it that were deleted; their bytes are still there."""

    @property
    def share(self) -> float:
        """Of a full fragment."""
        return max(self.rows / FULL_ROWS, self.size / FULL_BYTES)


def plan(fragments: Sequence[Fragment], expunge: bool = False) -> list[list[int]]:
    """Sets of fragments to merge, each into one.

    One of which half was deleted is written anew, so that retention costs less than a byte for each that it removes;
    with ``expunge`` each with any deleted row.
    """
    most = 0 if expunge else HOLES
    sets = [[each.id] for each in fragments if each.deleted > most * each.rows]
    taken = {number for each in sets for number in each}
    for bound in TIERS:
        group: list[Fragment] = []
        for fragment in fragments:
            if fragment.share >= bound or fragment.id in taken:
                continue
            group.append(fragment)
            enough = sum(each.share for each in group) >= bound or (bound == TIERS[0] and len(group) >= MANY)
            if enough and len(group) > 1:
                sets.append([each.id for each in group])
                taken.update(sets[-1])
                group = []
    return sets


def compact(store: SampleStore, expunge: bool = False) -> int:
    """Merge what :func:`plan` says. Returns the bytes written.

    Safe beside running workers: they never touch what is merged here, and positions are left alone.

    Raises:
        StoreUnavailable: the store cannot be read or written.
    """
    written = 0
    while sets := plan(_fragments(store), expunge):
        size = StoreWriter(store.table).merge(sets[0], ROWS_AT_ONCE)
        if not size:
            break  # somebody else changes these; next time
        written += size
    return written


def index(store: SampleStore) -> None:
    """Let the indexes cover every full fragment."""
    dataset = store.table.open()
    if dataset is None:
        return
    full = {each.id for each in _fragments(store) if each.share >= TIERS[-1] / 2}
    described: dict[str, list[set[int]]] = {name: [] for name in INDEXES}
    for each in dataset.list_indices():
        described.setdefault(each["name"], []).append(set(each["fragment_ids"]))
    for name, (column, kind) in INDEXES.items():
        deltas = described[name]
        if not full - set().union(*deltas):
            continue
        try:
            if not deltas:
                dataset.create_scalar_index(column, kind, name=name)
            else:
                merged = len(deltas) if len(deltas) >= MOST_DELTAS else 0
                dataset.optimize.optimize_indices(num_indices_to_merge=merged, index_names=[name])
        except CommitConflictError as error:
            log.info("index %s is brought up to date later: %s", name, error)
        except (OSError, RuntimeError) as error:
            raise outage(store.url, "indexed", error) from error


def clean(store: SampleStore, keep: timedelta) -> int:
    """Remove versions older than ``keep`` that nobody pinned, and the files that only they had. Returns their bytes.

    Raises:
        StoreUnavailable: the store cannot be read, or does not let some of the files be deleted.
    """
    dataset = store.table.open()
    if dataset is None:
        return 0
    try:
        stats = dataset.cleanup_old_versions(older_than=keep, error_if_tagged_old_versions=False)
    except (OSError, RuntimeError) as error:
        raise outage(store.url, "cleaned", error) from error
    if stats.failed_deletes:
        raise StoreUnavailable(
            f"{stats.failed_deletes} files of old versions of the sample store {store.url} were not deleted.",
            "Allow the credentials to delete objects under `lake_url` (S3: s3:DeleteObject).",
            "refused",
        )
    return int(stats.bytes_removed)


def _fragments(store: SampleStore) -> list[Fragment]:
    dataset = store.table.open()
    if dataset is None:
        return []
    positions = {each.fragment_id for each in fences(dataset)}
    return [
        Fragment(
            int(each.fragment_id),
            int(each.metadata.physical_rows),
            sum(file.file_size_bytes or 0 for file in each.data_files()),
            each.num_deletions,
        )
        for each in dataset.get_fragments()
        if each.fragment_id not in positions
    ]


def has_deleted_rows(store: SampleStore) -> bool:
    """Whether a data file of the newest version still has the bytes of rows that were deleted."""
    return any(each.deleted for each in _fragments(store))
