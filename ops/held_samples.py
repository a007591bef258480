"""Samples that are held, for command line and console: which, how many, and accepting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from core.errors import ConfigError
from core.ledger import Ledger
from streams.store.conditions import is_in, quoted
from streams.store.rows import HELD, SPLITS
from streams.store.sample_queries import count_values
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

WORDS: Final[Mapping[str, str]] = {
    "held_source": "Its source is held",
    "held_quota": "Its source has sent enough for a day",
    "held_agreement": "Image and text agree less than usual",
}
MOST: Final = 10_000
"""Samples that one call accepts: each is rewritten with its image."""
TOP: Final = 100
"""Sources that are counted by name, for each reason."""
NAMED: Final = 50
"""IDs that the audit log names."""
COLUMNS: Final = ("id", "split", "source", "domain", "text", "question", "answer", "reason", "detail")


def held_condition(source: str | None = None, reason: str | None = None) -> str:
    """Condition on held samples. An empty ``source``: those that name none. Raises ConfigError for a reason that does
    not exist."""
    clauses = ["kind = 'sample'", is_in("split", (quoted(split) for split in SPLITS if split.startswith(HELD)))]
    if source is not None:
        clauses.append(f"source = {quoted(source)}" if source else "(source = '' OR source IS NULL)")
    if reason is not None:
        if reason not in WORDS:
            raise ConfigError(f"no sample is held for {reason!r}.", f"One of {', '.join(WORDS)}.")
        clauses.append(f"reason = {quoted(reason)}")
    return " AND ".join(clauses)


def held_samples(
    store: SampleStore, limit: int, source: str | None = None, reason: str | None = None
) -> list[dict[str, Any]]:
    """The newest held samples, newest first, without images. Raises ConfigError, StoreUnavailable."""
    return store.newest(limit, held_condition(source, reason), COLUMNS)


def held_counts(store: SampleStore) -> list[dict[str, Any]]:
    """Numbers of held samples by source and reason, the largest first. Scans the store if any are held."""
    tally = store.tally()
    if not sum(tally[split] for split in SPLITS if split.startswith(HELD)):
        return []
    rows = [
        {"source": source, "reason": reason, "samples": count}
        for reason in WORDS
        for source, count in count_values(store, held_condition(reason=reason), ["source"])["source"].top(TOP)
    ]
    return sorted(rows, key=lambda row: (-row["samples"], row["source"]))


def accept_held(
    store: SampleStore, ledger: Ledger, ids: Sequence[str], *, actor: str, reason: str, source: str | None = None,
    held_for: str | None = None, follow: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> int:  # fmt: skip
    """Accept held samples, and return how many were held. The audit log has it first: nothing is accepted that is not
    recorded. ``source``, ``held_for``: how they were chosen, if not one by one. ``follow``: watches the IDs on their
    way. Raises LedgerError, or StoreUnavailable after some of them; then try again."""
    detail: dict[str, Any] = {"reason": reason, "samples": len(ids)}
    if source is None:
        subject = f"sample {ids[0]}" if len(ids) == 1 else "samples"
        detail["ids"] = [each[:12] for each in ids[:NAMED]]
    else:
        subject = f"source {source}".strip()[:200]
        detail |= {"held_for": held_for} if held_for else {}
    ledger.audit(actor, "accept samples", subject, detail)
    return StoreWriter(store.table).accept(follow(ids))
