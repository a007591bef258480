"""Rows for the sample store, without a stream."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from core.digests import digest_bytes
from streams.store.rows import Position
from streams.store.sample_store import SampleStore

TOPIC = "samples"


def sample(partition: int, offset: int, topic: str = TOPIC, split: str = "train", **fields: Any) -> dict[str, Any]:
    """A sample's row, unique to its position."""
    image = f"{topic}:{partition}:{offset}".encode()
    return {
        "kind": "sample",
        "id": digest_bytes(image),
        "image": image,
        "text": f"text {offset}",
        "question": "",
        "answer": "",
        "tags": ["a", "b"],
        "ingested_at": datetime(2026, 1, 2, tzinfo=UTC),
        "split": split,
        "look": offset.to_bytes(8, "big") + bytes(27),
        "words": offset,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        **fields,
    }


def refusal(partition: int, offset: int, original: bytes = b"bad", reason: str = "not_json") -> dict[str, Any]:
    return {
        "kind": "quarantine",
        "topic": TOPIC,
        "partition": partition,
        "offset": offset,
        "reason": reason,
        "detail": "no good",
        "ingested_at": datetime(2026, 1, 2, tzinfo=UTC),
        "original": original,
        "original_key": None,
        "original_headers": "[]",
    }


def put(store: SampleStore, rows: Sequence[dict[str, Any]], *positions: Position) -> int:
    return store.put(rows, positions)
