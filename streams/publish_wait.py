"""Waiting until ingest has dealt with what was published."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from core.errors import StoreUnavailable
from core.progress import meter
from core.settings import Settings
from streams.clients import Admin
from streams.rows import newest_of_topic
from streams.store import SampleStore

PAUSE_SECONDS = 0.5


def wait_until_stored(settings: Settings, last: Mapping[int, int], seconds: float) -> None:
    """Return when ingest has stored, or refused, everything up to these offsets.

    Args:
        last: by partition of ``kafka.topic``.

    Raises:
        StoreUnavailable: it has not within so many seconds.
        BrokerError, StoreError: the topic or the store cannot be read.
    """
    kafka = settings.kafka
    admin = Admin(kafka)
    try:
        topic_id = admin.topic_id(kafka.topic)
    finally:
        admin.close()
    store, deadline = SampleStore(settings.lake), time.monotonic() + seconds
    with meter("waiting for ingest") as show:
        while behind := _behind(store, kafka.topic, topic_id, last):
            if time.monotonic() >= deadline:
                raise StoreUnavailable(
                    f"ingest has not stored everything after {seconds:g} s: {behind:,} records are left.",
                    "All was delivered, and waits in the topic. Is `ratchet ingest` running?",
                )
            show(partial("{:,} records are left".format, behind))
            time.sleep(PAUSE_SECONDS)


def _behind(store: SampleStore, topic: str, topic_id: str | None, last: Mapping[int, int]) -> int:
    """Records up to the offsets that were not read yet, counted from the beginning where nothing was."""
    newest = newest_of_topic(store.positions().values(), topic)
    read = {number: each.next for number, each in newest.items() if each.topic_id == topic_id}
    return sum(max(0, offset + 1 - read.get(number, 0)) for number, offset in last.items())
