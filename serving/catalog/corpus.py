"""What the catalog reads of the sample store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, Protocol

import pyarrow as pa

from streams.store import Having

COLUMNS: Final = ["id", "image", "domain", "source", "time", "ingested_at", "text", "question", "answer"]


class Corpus(Protocol):
    """The part of the sample store that the catalog reads."""

    def version(self) -> int:
        """Version of the newest commit."""

    def offsets(self, version: int | None = None) -> dict[str, int]:
        """Next offset of each partition at a version."""

    def tally(self, version: int | None = None) -> Mapping[str, int]:
        """Numbers of rows by kind: ``deleted`` among them."""

    def deleted(self, version: int | None = None, since: datetime | None = None) -> pa.Table:
        """Ids of the samples that were deleted, and when."""

    def scan(
        self,
        version: int | None = None,
        *,
        after: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        having: Having | None = None,
    ) -> pa.Table:
        """Rows of a version, or of the newest; at or after the given offsets."""


def with_text(rows: pa.Table) -> pa.Table:
    """Rows whose ``text`` falls back to question and answer."""
    texts = [
        text or " ".join(part for part in (question, answer) if part)
        for text, question, answer in zip(
            rows["text"].to_pylist(), rows["question"].to_pylist(), rows["answer"].to_pylist(), strict=True
        )
    ]
    return rows.set_column(rows.schema.get_field_index("text"), "text", pa.array(texts, pa.string()))
