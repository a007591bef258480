"""Rows for the sample store, without a stream."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from core.digests import digest_bytes
from streams.store.rows import Position
from streams.store.sample_store import SampleStore

TOPIC = "samples"


WHEN = datetime(2026, 1, 2, tzinfo=UTC)


def sample(partition: int, offset: int, topic: str = TOPIC, split: str = "train", **fields: Any) -> dict[str, Any]:
    """A sample's row, unique to its position."""
    image = f"{topic}:{partition}:{offset}".encode()
    return {
        "kind": "sample", "id": digest_bytes(image), "image": image, "text": f"text {offset}", "question": "",
        "answer": "", "tags": ["a", "b"], "ingested_at": WHEN, "split": split, "words": offset,
        "look": offset.to_bytes(8, "big") + bytes(27), "topic": topic, "partition": partition, "offset": offset,
        **fields,
    }  # fmt: skip


def refusal(partition: int, offset: int, original: bytes = b"bad", reason: str = "not_json") -> dict[str, Any]:
    return {
        "kind": "quarantine", "topic": TOPIC, "partition": partition, "offset": offset, "reason": reason,
        "detail": "no good", "ingested_at": WHEN, "original": original, "original_key": None, "original_headers": "[]",
    }  # fmt: skip


def put(store: SampleStore, rows: Sequence[dict[str, Any]], *positions: Position) -> int:
    return store.put(rows, positions)
