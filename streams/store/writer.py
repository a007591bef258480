"""Writes to the sample store: claims on partitions, and commits under them.

A commit appends the rows of a batch and, in the same Lance transaction, replaces the position of each partition that
they came from. A position's fragment is also the partition's fence: a commit has to remove the fragment that its claim
wrote last, which is gone if another process has claimed the partition since. So records and their offsets are stored
together or not at all, and of two processes that read the same partition only the newer one can store. Commits to
different partitions do not conflict: Lance rebases one on the other. Retries write only the manifest again, never data
files.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import lance
import pyarrow as pa
from lance.commit import CommitConflictError
from lance.fragment import write_fragments

from core.errors import StoreUnavailable, Superseded
from streams.store.conditions import CONTENT, IDS_PER_QUERY, SENT, at_offset, at_positions, is_in, quoted
from streams.store.rows import (
    CLAIM,
    HELD,
    POSITION_SCHEMA,
    ROOT,
    SCHEMA,
    Position,
    RecordPosition,
    SampleTable,
    chunks,
    deletion_row,
    duplicate_row,
    outage,
    position_of,
    positions,
    tally_of,
)

Rows = Sequence[Mapping[str, Any]]
_REMOVED: Final = ["kind", "split", "text", "question", "size", "until", *CLAIM]
DELETION: Final = "deletion"
IMAGES_AT_ONCE: Final = 64
MOVED: Final = {"ratchet": "moved"}
"""Transaction property of commits that only move rows."""
ATTEMPTS: Final = 30
"""Lance's own retries pass name conflicts on; ours start again from the newest version, some 10 ms each."""
OUTAGES: Final = 2
"""Of these, attempts that may fail for another reason than a conflict: each can take as long as Lance's own retries."""


@dataclass(eq=False, slots=True)
class Claim:
    position: Position
    fragment: int

    @property
    def key(self) -> str:
        return self.position.key


class StoreWriter:
    """Commits to the sample store. Use from one thread at a time."""

    def __init__(self, table: SampleTable) -> None:
        self.table = table

    def claim(
        self, starts: Iterable[Position], rows: Rows = (), moves: Sequence[tuple[Claim, Position]] = ()
    ) -> list[Claim]:
        """Take over partitions, each at its stored position, or at the given one where none is stored. A topic ID that
        the store does not know yet is taken from the given position. ``rows`` and ``moves`` are committed in the same
        transaction, as by :meth:`commit`. Claims nothing and raises Superseded if a claim in ``moves`` is not the
        newest, or StoreUnavailable; then try again."""
        wanted = list(starts)
        for _ in range(ATTEMPTS):
            dataset = self.table.create()
            known = {position.key: (fragment, position) for fragment, position in positions(dataset)}
            taken = [known.get(start.key, (-1, start)) for start in wanted]
            claimed = [
                Claim(replace(each, epoch=each.epoch + 1, topic_id=each.topic_id or start.topic_id), fragment)
                for start, (fragment, each) in zip(wanted, taken, strict=True)
            ]
            taken_over = [(claim, claim.position) for claim in claimed]
            if any(claim.fragment < 0 for claim in claimed):
                fragment, root = known[ROOT.key]
                taken_over.append((Claim(root, fragment), root))
            try:
                self._commit(rows, [*moves, *taken_over])
            except Superseded as error:
                if {claim.key for claim, _ in moves} & set(error.keys):
                    raise
                continue  # another process claims the same partitions, or creates others
            return claimed
        raise self._contended("Are there more ingest processes than partitions? Stop some.")

    def commit(
        self,
        rows: Rows | pa.Table,
        moves: Sequence[tuple[Claim, Position]],
        replaced: Mapping[RecordPosition, dict[str, Any]] | None = None,
        base: Any = None,
    ) -> int:
        """Store rows and the new positions of their partitions in one transaction. Returns the version. ``replaced``
        has positions of samples and duplicates to remove in the same transaction, each with its receipt. Those already
        gone are skipped; a sample that another record also sent passes to that record. ``base``: the newest version, if
        the caller has just opened it. Stores nothing and raises Superseded if a claim is not the newest, or
        StoreUnavailable; then try again."""
        if not replaced:
            return self._commit(rows, moves, base)
        where = f"{SENT} AND ({at_positions(replaced)})"

        def receipt(row: dict[str, Any], stays: bool) -> dict[str, Any]:
            known = replaced[position_of(row)]
            return {**known, "id": None, "duplicate_of": row["id"]} if stays else known

        corrected = {row["id"] for row in rows if row["kind"] == "sample"}  # stored again, so nothing passes on
        return self._swap(where, receipt, rows, moves, True, corrected)[1]

    def put(self, rows: Rows, ends: Iterable[Position]) -> int:
        """Claim partitions and store rows with the positions behind them: for data that does not come from a
        consumer."""
        ends = list(ends)
        claims = self.claim(replace(end, next=0) for end in ends)
        moves = []
        for claim, end in zip(claims, ends, strict=True):
            own = [row for row in rows if (row["topic"], row["partition"]) == (end.stream, end.partition)]
            tally = claim.position.tally + tally_of(own)
            moves.append((claim, replace(end, epoch=claim.position.epoch, tally=tally)))
        return self._commit(rows, moves)

    def remove(self, where: str, reason: str, detail: str) -> list[dict[str, Any]]:
        """Delete the rows that meet a condition (in Lance's SQL), and leave a receipt for each, in one transaction.
        Returns their kind, position, id, split, source and time. Deletes nothing if it raises StoreUnavailable; then
        try again. With the reason :data:`DELETION` records are deleted: a sample passes to another record that also
        sent it, unless that meets the condition too. Other reasons delete samples and quarantined records. The bytes
        stay in the data files until maintenance has rewritten those and removed the old versions."""
        of, pass_on = (SENT, True) if reason == DELETION else (CONTENT, False)
        receipt = partial(deletion_row, reason=reason, detail=detail, when=datetime.now(UTC))
        return self._swap(f"{of} AND ({where})", receipt, pass_on=pass_on)[0]

    def remove_rows(self, details: Mapping[RecordPosition, str]) -> list[dict[str, Any]]:
        """Delete the rows at some positions, like :meth:`remove`, each with its own receipt detail."""
        now = datetime.now(UTC)

        def receipt(row: dict[str, Any], stays: bool) -> dict[str, Any]:
            return deletion_row(row, DELETION, details[position_of(row)], now, stays)

        return self._swap(f"{SENT} AND ({at_positions(details)})", receipt, pass_on=True)[0] if details else []

    def hold(self, reasons: Mapping[str, tuple[str, str]]) -> int:
        """Hold samples back from learning and judging: a reason and its detail by ID. Returns how many were not held
        already."""

        def held(row: dict[str, Any], stays: bool) -> dict[str, Any]:
            reason, detail = reasons[row["id"]]
            return {**row, "split": f"{HELD}{row['split']}", "reason": reason, "detail": detail}

        return self._resplit(reasons, "split IN ('train', 'fresh_eval')", held)

    def accept(self, ids: Iterable[str]) -> int:
        """Let held samples be used, each on its side of the split, as new ones. Returns how many were held."""
        version = int(self.table.create().version) + 1

        def accepted(row: dict[str, Any], stays: bool) -> dict[str, Any]:
            known = {"reason": None, "detail": None, "until": version}
            return {**row, **known, "split": row["split"].removeprefix(HELD)}

        return self._resplit(ids, "split NOT IN ('train', 'fresh_eval')", accepted)

    def _resplit(self, ids: Iterable[str], where: str, change: Callable[..., dict[str, Any]]) -> int:
        """Rewrite samples, with their images, some at a time. Raises StoreUnavailable after some of them."""
        changed = 0
        for some in chunks(ids, IMAGES_AT_ONCE):
            named = f"kind = 'sample' AND {where} AND {is_in('id', map(quoted, some))}"
            changed += len(self._swap(named, change, columns=SCHEMA.names)[0])
        return changed

    def settle_double(self, sample_id: str, position: RecordPosition) -> bool:
        """Turn a sample that is also stored at another position into a duplicate. False if it already is one."""
        where = f"kind = 'sample' AND id = {quoted(sample_id)} AND {at_offset(*position)}"
        return bool(self._swap(where, lambda row, stays: duplicate_row(row, "exact", sample_id))[0])

    def _swap(
        self,
        where: str,
        receipt: Callable[..., dict[str, Any]],
        new: Rows = (),
        moves: Sequence[tuple[Claim, Position]] = (),
        pass_on: bool = False,
        kept: Collection[str] = (),
        columns: Sequence[str] = _REMOVED,
    ) -> tuple[list[dict[str, Any]], int]:
        """Replace each row that meets ``where`` (in Lance's SQL), and store new rows. Returns the replaced rows and the
        version. ``receipt`` makes the replacement from a row's ``columns``, and ``stays``: whether its content stays in
        the store. ``pass_on``: pass a sample to a duplicate record that also sent it. ``kept``: IDs of samples that
        stay stored in any case."""
        for _ in range(ATTEMPTS):
            dataset = self.table.create()
            table = dataset.to_table(columns=list(columns), filter=where, with_row_address=True)
            rows: list[dict[str, Any]] = table.to_pylist()
            if not rows:
                return [], self._commit(new, moves) if moves else int(dataset.version)
            passed = _passed_on(dataset, rows, kept) if pass_on else []
            gone = [*rows, *(duplicate for duplicate, _ in passed)]
            theirs = f"kind = 'duplicate' AND ({at_positions(position_of(each) for each, _ in passed) or 'false'})"
            parts = {int(row["_rowaddr"]) >> 32 for row in gone}
            every = f"({where}) OR ({theirs})"
            changed = {number: dataset.get_fragment(number).delete(every) for number in sorted(parts)}
            stay = {sample["id"] for _, sample in passed} | set(kept)
            receipts = [receipt(row, stays=row["kind"] == "duplicate" or row["id"] in stay) for row in rows]
            receipts += [sample for _, sample in passed]
            fragment, root = next(each for each in positions(dataset) if each[1].key == ROOT.key)
            tally = Counter(root.tally)
            tally.subtract(tally_of(gone))
            tally.update(tally_of(receipts))
            root_move = (Claim(root, fragment), replace(root, tally=tally))
            try:
                version = self._commit([*new, *receipts], [*moves, root_move], dataset, changed)
            except CommitConflictError:
                continue
            return rows, version
        raise self._contended()

    def _contended(self, fix: str = "Try again.") -> StoreUnavailable:
        words = f"the sample store {self.table.url} could not be written: {ATTEMPTS} conflicts in a row."
        return StoreUnavailable(words, fix)

    def merge(self, fragments: Sequence[int], rows_at_once: int) -> int:
        """Rewrite some fragments as one, without deleted rows. Returns the bytes written; 0 if another process changed
        one of them meanwhile, and nothing was changed. Raises StoreUnavailable, also without a change; then try again.
        Lance's own compaction merges only neighbours, and moves what it writes to the end, where it separates other
        neighbours."""
        dataset = self.table.create()
        parts = [dataset.get_fragment(number) for number in fragments]
        new: list[Any] = []
        try:
            rows = dataset.scanner(fragments=parts, batch_size=rows_at_once, scan_in_order=True).to_reader()
            new = write_fragments(rows, dataset, mode="append", max_rows_per_file=1 << 30, max_bytes_per_file=1 << 40)
            operation = lance.LanceOperation.Update(
                removed_fragment_ids=sorted(fragments), updated_fragments=[], new_fragments=new, fields_modified=[]
            )
            moved = lance.Transaction(dataset.version, operation, transaction_properties=MOVED)
            lance.LanceDataset.commit(self.table.url, moved)
        except (OSError, RuntimeError) as error:
            if not _is_conflict(error):
                raise outage(self.table.url, "compacted", error) from error
            # No version refers to these files, and they may hold rows that are deleted next; Lance would keep them for
            # a week.
            self.table.discard(file.path for fragment in new for file in fragment.files)
            return 0
        return sum(file.file_size_bytes or 0 for fragment in new for file in fragment.files)

    def _commit(
        self,
        rows: Rows | pa.Table,
        moves: Sequence[tuple[Claim, Position]],
        base: Any = None,
        changed: Mapping[int, Any] | None = None,
    ) -> int:
        url = self.table.url
        base = base or self.table.create()
        try:
            new = _write(rows, base, SCHEMA) if len(rows) else []
            marks = _write([position.row() for _, position in moves], base, POSITION_SCHEMA, max_rows_per_file=1)
            dataset = self._replace(base, [claim.fragment for claim, _ in moves], [*new, *marks], changed or {})
        except CommitConflictError:  # it is also an OSError
            raise
        except (OSError, RuntimeError) as error:
            raise outage(url, "written", error) from error
        if dataset is None:
            present = {fragment.fragment_id for fragment in self.table.create().get_fragments()}
            raise Superseded([claim.key for claim, _ in moves if claim.fragment not in present and claim.fragment >= 0])
        paths = [mark.files[0].path for mark in marks]
        numbers = _fragments_by_path(dataset, paths)
        for (claim, position), path in zip(moves, paths, strict=True):
            claim.position, claim.fragment = position, numbers[path]
        return int(dataset.version)

    def _replace(self, base: Any, old: Sequence[int], new: Sequence[Any], changed: Mapping[int, Any]) -> Any | None:
        """Commit a version in which ``new`` replaces the fragments ``old``; None if one of those is gone. ``changed``
        holds fragments of ``base`` with more rows deleted (None: all). Raises CommitConflictError if another process
        changes one of those first."""
        fences_removed = {number for number in old if number >= 0}
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=sorted(fences_removed | {number for number, left in changed.items() if left is None}),
            updated_fragments=[left for left in changed.values() if left is not None],
            new_fragments=list(new),
            fields_modified=[],
        )
        failure: Exception | None = None
        outages = 0
        for attempt in range(1 if changed else ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0.002, 0.01) * attempt)  # noqa: S311  (spreads the tries)
                base = self.table.create()
                if failure is not None and _fragments_by_path(base, [new[-1].files[0].path]):
                    return base  # the commit succeeded, only its response was lost
                if failure is not None and outages >= OUTAGES:
                    raise failure
            if fences_removed - {fragment.fragment_id for fragment in base.get_fragments()}:
                return None
            try:
                return lance.LanceDataset.commit(base, operation, read_version=base.version)
            except CommitConflictError:
                if changed:
                    raise
            except OSError as error:
                if changed and _is_conflict(error):
                    raise CommitConflictError(str(error)) from error
                failure = error
                outages += not _is_conflict(error)
        raise failure or self._contended()


def _passed_on(
    dataset: Any, rows: Sequence[Mapping[str, Any]], kept: Collection[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Find duplicates that removed samples pass to: the newest with the key and source of the sample's first duplicate,
    each with the sample's row under that record's columns."""
    leaving = {row["_rowaddr"] for row in rows}
    samples = {row["id"]: row for row in rows if row["kind"] == "sample" and row["id"] not in kept}
    heirs: dict[str, dict[str, Any]] = {}
    for ids in chunks(samples, IDS_PER_QUERY):
        where = f"kind = 'duplicate' AND reason = 'duplicate_exact' AND {is_in('id', map(quoted, ids))}"
        table = dataset.to_table(columns=["kind", *CLAIM], filter=where, with_row_address=True)
        for row in sorted(table.to_pylist(), key=lambda row: (row["ingested_at"], position_of(row))):
            if row["_rowaddr"] in leaving:
                continue
            first = heirs.setdefault(row["id"], row)
            if (first["key"], first["source"]) == (row["key"], row["source"]):
                heirs[row["id"]] = row
    passed = []
    for ids in chunks(heirs, IDS_PER_QUERY):
        places = at_positions(position_of(samples[each]) for each in ids)
        for sample in dataset.to_table(columns=SCHEMA.names, filter=f"kind = 'sample' AND ({places})").to_pylist():
            heir = heirs[sample["id"]]
            claim = {name: heir[name] for name in CLAIM if heir[name] is not None or name in ("key", "sent_at")}
            passed.append((heir, {**sample, **claim}))
    return passed


def _is_conflict(error: Exception) -> bool:
    """Detect a lost race: Lance reports it by its own type, or in an OSError's message."""
    return isinstance(error, CommitConflictError) or "commit conflict" in str(error).lower()


def _write(rows: Rows | pa.Table, base: Any, schema: pa.Schema, **options: Any) -> list[Any]:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    return list(write_fragments(table, base, mode="append", **options))


def _fragments_by_path(dataset: Any, paths: Sequence[str]) -> dict[str, int]:
    wanted = set(paths)
    return {
        file.path: int(fragment.fragment_id)
        for fragment in dataset.get_fragments()
        for file in fragment.data_files()
        if file.path in wanted
    }
