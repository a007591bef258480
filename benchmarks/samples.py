"""Images as accepted samples, as ingest would have stored them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from ops.settings import Settings
from streams.records import Sample
from streams.rows import Position
from streams.store import SampleStore


def fill_store(settings: Settings, images: Sequence[bytes]) -> list[str]:
    """Store images as the first samples of a lake. Returns their ids."""
    rows, ids = [], []
    for offset, image in enumerate(images):
        sample = Sample(image=image, text=f"picture {offset}", domain="bench", source="bench")
        at = datetime.now(UTC)
        rows.append(
            {
                "kind": "sample", "id": sample.id, "image": image, "text": sample.text, "domain": sample.domain,
                "source": sample.source, "time": at, "ingested_at": at, "split": "train", "tags": [], "topic": "bench",
                "partition": 0, "look": None, "words": 0, "offset": offset, "question": "", "answer": "",
            }
        )  # fmt: skip
        ids.append(sample.id)
    SampleStore(settings.lake).put(rows, [Position("bench", 0, len(images))])
    return ids
