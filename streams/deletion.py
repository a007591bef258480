"""Deleting samples: from the store, its old versions and the quarantine rows; the catalog and replay follow the store.

A *selector* says what is to be deleted. All that it names has to hold, and it names at least one of

    id        the sample's id, 64 hex digits
    source    where it is from, as producers state it; also of refused records
    domain, concept, label
    key       the record's key, in hex
    record    topic:partition:offset, also of a refused record
    before    only what was ingested before this time (ISO 8601)

A tombstone in the topic (a null value with the record's key, or with the header ``ratchet_id``) is a deletion, too, of
what came before it.

What deletion does not reach: the topic itself and the quarantine topic (their retention ends it; topics that Ratchet
makes for refusals keep them for a week), and the weights of adapters that learned from it, which the receipt names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from ops.digests import digest12, digest_json
from ops.errors import ConfigError
from ops.ledger import DeletionRow, Ledger
from streams.rows import name_of, parse_position
from streams.sql import hexadecimal, moment, quoted
from streams.store import SampleStore
from streams.writer import StoreWriter

FIELDS: Final = ("id", "source", "domain", "concept", "label", "key", "record", "before")
TOMBSTONES: Final = "tombstone "
_HEX = re.compile(r"(?:[0-9a-f]{2})+")


def request_deletion(ledger: Ledger, selector: Mapping[str, str], *, actor: str, reason: str) -> DeletionRow:
    """Ask for a deletion. Maintenance carries it out.

    Raises:
        ConfigError: the selector is not one.
    """
    chosen = {name: value for name, value in selector.items() if value}
    condition(chosen)
    now = datetime.now(UTC)
    # What comes in later is another matter: without this, a source could never be used again.
    chosen.setdefault("before", now.isoformat())
    return ledger.request_deletion(f"deletion-{digest12(digest_json(chosen))}", chosen, actor=actor, reason=reason)


def count_selected(store: SampleStore, selector: Mapping[str, str]) -> int:
    """How many samples and refusals a selector selects now. Raises ConfigError, StoreError."""
    return len(store.select(f"kind IN ('sample', 'quarantine') AND {condition(selector)}", ["offset"]))


def condition(selector: Mapping[str, str]) -> str:
    """A selector in Lance's SQL. Raises ConfigError naming the field that is wrong."""
    if unknown := set(selector) - set(FIELDS):
        raise ConfigError(f"a deletion cannot select by {sorted(unknown)}.", f"Fields: {', '.join(FIELDS)}.")
    if not set(selector) - {"before"}:
        raise ConfigError("a deletion of everything is not one.", f"Name one of {', '.join(FIELDS[:-1])}.")
    parts = [_clause(name, str(value)) for name, value in sorted(selector.items())]
    return f"({' AND '.join(parts)})"


def take_tombstones(store: SampleStore, ledger: Ledger) -> int:
    """Record the tombstones that ingest has stored as deletions. Returns how many were new."""
    if store.tally()["tombstone"] <= ledger.count_deletions(TOMBSTONES):
        return 0
    new = 0
    columns = ["topic", "partition", "offset", "id", "key", "ingested_at"]
    for row in store.select("kind = 'tombstone'", columns):
        name = f"{TOMBSTONES}{name_of((row['topic'], row['partition'], row['offset']))}"
        if ledger.deletion(name) is None:
            what = {"id": row["id"]} if row["id"] else {"key": row["key"].hex()}
            selector = {**what, "before": row["ingested_at"].isoformat()}
            ledger.request_deletion(name, selector, actor="producer", reason="a tombstone in the topic")
            new += 1
    return new


def remove(store: SampleStore, ledger: Ledger, deletion: DeletionRow) -> int:
    """Take what a deletion selects out of the newest version of the store. Returns the number of rows."""
    rows = StoreWriter(store.table).remove(condition(deletion.selector), "deletion", deletion.id)
    samples = [row for row in rows if row["kind"] == "sample"]
    ledger.deletion_removed(
        deletion.id,
        samples=len(samples),
        refusals=len(rows) - len(samples),
        adapters=adapters_of(ledger, samples),
    )
    return len(rows)


def adapters_of(ledger: Ledger, samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The adapters that learned from some of the samples, and those that may have replayed them since."""
    learned, replayed = [], []
    train = [row for row in samples if row["split"] == "train"]
    for update in reversed(ledger.updates(10_000)):
        if update.adapter is None:
            continue
        field = "text" if update.family == "clip" else "question"
        offsets = [(f"{row['topic']}:{row['partition']}", row["offset"]) for row in train if row[field]]
        if any(update.data_from.get(key, 0) <= offset < update.data_to.get(key, 0) for key, offset in offsets):
            learned.append(update.adapter)
        elif any(offset < update.data_from.get(key, 0) for key, offset in offsets):
            replayed.append(update.adapter)
    return {"learned": learned, "may_have_replayed": replayed}


def _clause(name: str, value: str) -> str:
    match name:
        case "before":
            return f"ingested_at < {moment(_time(value))}"
        case "key":
            if not _HEX.fullmatch(value):
                raise ConfigError("`key` of the deletion is not in hex.", "Write the bytes of the key in hex digits.")
            return f"key = {hexadecimal(bytes.fromhex(value))}"
        case "record":
            try:
                topic, partition, offset = parse_position(value)
            except ValueError:
                raise ConfigError(f"{value[:300]!r} is no record.", "A record reads topic:partition:offset.") from None
            return f"topic = {quoted(topic)} AND partition = {partition} AND offset = {offset}"
        case _:
            return f"{name} = {quoted(value)}"


def _time(value: str) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(f"`before` of the deletion, {value[:80]!r}, is no time.", "Write 2026-01-31.") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
