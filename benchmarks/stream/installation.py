"""A new home, store and topics for one measurement, and workers that read them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kafka import KafkaProducer

from benchmarks.stream.ratchet_process import RatchetProcess, wait_for, write_settings
from core.settings import Settings
from ratchet_client.broker import MAX_RECORD_BYTES
from streams.kafka.clients import ensure_topics
from streams.store.sample_store import SampleStore

FLUSH_EVERY = 200
HELD_SESSION_SECONDS = 20
"""Longest time for which a worker may be stopped while its records are made. The embedded broker admits no members for
half of it."""


class Installation:
    """The resources of one group of workers."""

    def __init__(
        self, base: Settings, home: Path, bootstrap: str, kafka: Mapping[str, Any] | None = None, **sections: Any
    ) -> None:
        """``base``: source of ingest's limits. The topics are made."""
        name = uuid.uuid4().hex[:8]
        own = {
            "bootstrap": bootstrap,
            "topic": f"samples-{name}",
            "quarantine_topic": f"quarantine-{name}",
            "events_topic": f"events-{name}",
            "group": f"ingest-{name}",
            "client": {},
        }
        home.mkdir(parents=True, exist_ok=True)
        ours = base.kafka.model_copy(update={**own, **(kafka or {})})
        self.settings = Settings(home=home, ingest=base.ingest, kafka=ours, **sections)
        self.kafka = self.settings.kafka
        self.store = SampleStore(self.settings.lake)
        self.config = write_settings(self.settings, home / "settings.json")
        self.apart = False
        """True if each worker has its own home, and so its own duplicate index, as on different machines."""
        ensure_topics(self.kafka, [self.kafka.topic], self.kafka.partitions)
        ensure_topics(self.kafka, [self.kafka.quarantine_topic])

    def stored(self) -> int:
        return sum(position.next for position in self.store.positions().values() if self.is_ours(position.stream))

    def is_ours(self, stream: str) -> bool:
        return stream == self.kafka.topic

    def stored_at(self) -> float:
        """Time of the last commit: seconds since 1970."""
        return max(each.stat().st_mtime for each in Path(self.store.url, "_versions").iterdir())

    def wait_until_stored(self, count: int, seconds: float = 300.0) -> None:
        """Wait until this many records are stored. Raises RatchetError."""
        wait_for(lambda: self.stored() >= count, f"{count} stored records", seconds)

    def config_of(self, number: int) -> Path:
        if not self.apart:
            return self.config
        home = self.settings.home / f"home-{number}"
        home.mkdir(exist_ok=True)
        urls = {"lake_url": self.settings.lake, "ledger_url": self.settings.ledger}
        return write_settings(self.settings.model_copy(update={"home": home, **urls}), home / "settings.json")

    def worker(self, number: int = 0) -> RatchetProcess:
        """A worker that is not started yet."""
        return RatchetProcess("ingest", self.config_of(number), self.settings.home / f"ingest-{number}.log")

    @contextmanager
    def workers(self, count: int) -> Iterator[list[RatchetProcess]]:
        with ExitStack() as stack:
            parts = [stack.enter_context(self.worker(number)) for number in range(count)]
            for part in parts:
                part.wait_for(lambda: self._shared(parts), "all workers had partitions")
            yield parts

    def _shared(self, parts: Sequence[RatchetProcess]) -> bool:
        lags = [part.lags() for part in parts]
        return all(lags) and sum(map(len, lags)) == self.kafka.partitions


def produce(bootstrap: str, topic: str, images: Iterable[bytes], partitions: int, first: int = 0) -> int:
    """Send images with a text each, over the partitions in turn. Returns their number. One record a batch, because the
    end offsets of :class:`streams.kafka.broker.EmbeddedBroker` count batches. Raises kafka.errors.KafkaError.
    """
    producer = KafkaProducer(bootstrap_servers=bootstrap, batch_size=0, max_request_size=MAX_RECORD_BYTES)
    sent = []
    try:
        for number, image in enumerate(images, first):
            headers = [("ratchet_text", f"picture {number}".encode())]
            sent.append(producer.send(topic, image, headers=headers, partition=number % partitions))
            if len(sent) % FLUSH_EVERY == 0:
                producer.flush(60)
        producer.flush(60)
        for each in sent:
            each.get(timeout=1)
        return len(sent)
    finally:
        producer.close(5)
