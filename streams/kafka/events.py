"""CloudEvents 1.0 about releases and more, published to the topic ``kafka.events_topic``. The ledger records an event
in the transaction of its fact; :class:`EventPublisher` publishes it once (:mod:`streams.kafka.outbox`), in the ledger's
order. docs/events.md describes the events."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from core import metrics
from core.dependencies import answered, noted
from core.errors import Fenced, LeaseLost, RatchetError
from core.ledger import EventRow, Ledger
from core.ledger.leases import lease_holder
from core.settings import Settings
from core.settings.streams import Kafka
from ratchet_client.encoding import EVENT_TYPE, Encoded
from streams.kafka.clients import ensure_topics
from streams.kafka.outbox import FencedSender, Outbox, OutboxEntry

log = logging.getLogger(__name__)
LEASE = "events"
#: More than two sends (``outbox.SEND_SECONDS`` each: records, then the commit), so that a lease renewed just before one
#: does not expire in the middle.
LEASE_SECONDS = 60.0
BATCH = 100
POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0


def event_record(row: EventRow, source: str) -> Encoded:
    """The Kafka record of an event: structured CloudEvents 1.0, with attributes also as ``ce_`` headers. ``source`` is
    the attribute that names the installation."""
    attributes = {
        "specversion": "1.0",
        "id": row.event_id,
        "source": source,
        "type": row.type,
        "subject": row.subject,
        "time": row.time.isoformat(),
        "sequence": f"{row.id:012d}",
    }
    event = {**attributes, "datacontenttype": "application/json", "data": row.data}
    headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
    value = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
    return Encoded(row.subject.encode(), value, [("content-type", EVENT_TYPE.encode()), *headers])


def event_id_of(record: Any, source: str) -> str | None:
    headers = dict(record.headers)
    if headers.get("ce_source") != source.encode() or not headers.get("ce_id"):
        return None
    return str(headers["ce_id"].decode(errors="replace"))


def transactional_id(kafka: Kafka) -> str:
    return f"ratchet-events:{kafka.events_topic}:{kafka.events_source}"


class EventPublisher:
    """Publishes a ledger's events while it holds the lease ``events``. One thread at a time."""

    def __init__(self, settings: Settings, ledger: Ledger, lease_seconds: float = LEASE_SECONDS) -> None:
        self.kafka = settings.kafka
        self.ledger = ledger
        self.holder = lease_holder()
        self.lease_seconds = lease_seconds
        self._epoch: int | None = None
        self._topic_made = False
        sender = FencedSender(self.kafka, transactional_id(self.kafka), self._renew)
        source = self.kafka.events_source
        self._outbox = Outbox(self.kafka.events_topic, sender, lambda record: event_id_of(record, source))

    @property
    def enabled(self) -> bool:
        return bool(self.kafka.events_topic)

    def run(self, stopping: threading.Event) -> None:
        last_error = ""
        try:
            while self.enabled and not stopping.is_set():
                error = ""
                try:
                    self.publish_pending()
                except (RatchetError, SQLAlchemyError) as failure:
                    noted(failure)
                    error = str(failure)
                    if error != last_error:
                        log.warning("events are not published: %s", error)
                last_error = error
                stopping.wait(RETRY_SECONDS if error else POLL_SECONDS)
        finally:
            self.close()

    def publish_pending(self) -> int:
        """Publish waiting events. Returns the number marked as published; 0 also if another process publishes. Raises
        BrokerError or SQLAlchemyError if the broker or the ledger is unavailable; the next call finds out what was
        sent."""
        total = 0
        self._measure()
        while self.enabled and (rows := self.ledger.waiting_events(BATCH)):
            if not self._acquire():
                break
            try:
                total += self._publish(rows)
            except (Fenced, LeaseLost) as error:
                log.info("another process publishes events now: %s", error)
                self._give_up()
                break
            except BaseException:
                self._outbox.close()
                self._topic_made = False  # a restarted embedded broker has lost the topic
                raise
        self._measure()
        return total

    def close(self) -> None:
        epoch = self._epoch
        self._give_up()
        if epoch is not None:
            try:
                self.ledger.release_lease(LEASE, epoch)
            except (SQLAlchemyError, RatchetError) as error:
                log.info("the lease of events could not be given back (%s); it runs out by itself", error)

    def _measure(self) -> None:
        """Record the number of waiting events; also before sending, in case the broker is unreachable."""
        if self.enabled:
            metrics.events.waiting(self.ledger.count_waiting_events())

    def _publish(self, rows: Sequence[EventRow]) -> int:
        if not self._topic_made:
            ensure_topics(self.kafka, [self.kafka.events_topic])
            self._topic_made = True
        source = self.kafka.events_source
        entries = [OutboxEntry(row.event_id, event_record(row, source), row.time) for row in rows]
        places = self._outbox.publish(entries)
        marks = {row.id: (places[row.event_id].partition, places[row.event_id].offset) for row in rows}
        assert self._epoch is not None
        self.ledger.mark_published(marks, lease=LEASE, epoch=self._epoch)
        self._outbox.forget(places)
        answered(["broker"])
        for type, count in Counter(row.type for row in rows).items():
            metrics.events.published(type, count)
        return len(rows)

    def _acquire(self) -> bool:
        epoch = self.ledger.acquire_lease(LEASE, self.holder, self.lease_seconds)
        if epoch != self._epoch:
            self._outbox.close()
            self._epoch = epoch
        return epoch is not None

    def _renew(self) -> bool:
        return self._epoch is not None and self.ledger.renew_lease(LEASE, self._epoch, self.lease_seconds)

    def _give_up(self) -> None:
        self._outbox.close()
        self._epoch = None
