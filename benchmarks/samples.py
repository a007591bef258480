"""Images as accepted samples, as ingest would have stored them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from benchmarks.stream.ratchet_process import wait_for
from core.settings import Settings
from ratchet_client import Client, ServerError
from ratchet_client.records import Sample
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import sample


def fill_store(settings: Settings, images: Sequence[bytes]) -> list[str]:
    """Store images as the first samples of a lake. Returns their IDs."""
    made = [Sample(image=image, text=f"picture {n}", domain="bench", source="bench") for n, image in enumerate(images)]
    at = datetime.now(UTC)
    rows = [
        sample(0, offset, "bench", id=each.id, image=each.image, text=each.text, domain=each.domain, source=each.source,
               time=at, ingested_at=at, tags=[], look=None, words=0)
        for offset, each in enumerate(made)
    ]  # fmt: skip
    SampleStore(settings.lake).put(rows, [Position("bench", 0, len(images))])
    return [each.id for each in made]


def wait_until_searchable(client: Client, count: int) -> None:
    """Wait until a search sees this many samples: a server answers CLIP requests before it has embedded what was
    stored.

    Raises RatchetError when that takes too long.
    """

    def searchable() -> bool:
        with suppress(ServerError):  # the controller has not answered yet
            catalog = client.status()["catalog"]
            return bool(catalog and catalog["corpus_rows"] >= count and catalog["coverage"] >= 1.0)
        return False

    wait_for(searchable, f"{count} samples were searchable")
