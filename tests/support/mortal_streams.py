"""An ingest and a publisher of events that kill themselves, or stop themselves once (SIGSTOP), at a chosen point."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from kafka import KafkaProducer

from core.errors import BrokerError
from core.ledger import Ledger
from core.settings import Settings
from streams.ingest.consumer import Consumer, run_ingest
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import Membership
from streams.ingest.quarantine import QuarantinePublisher
from streams.kafka.events import EventPublisher
from streams.kafka.outbox import FencedSender, Outbox
from streams.store.writer import StoreWriter
from tests.support.sudden_death import die, interrupt

Arrange = Callable[[], object]
send = FencedSender._send


def one_then_die(self: FencedSender, topic: str, records: Any) -> Any:
    """``FencedSender._send``, but only the first record of a batch is sent and committed before the process dies."""
    result = send(self, topic, records[:1])
    if len(records) > 1:
        die()
    return result


DEATHS: dict[str, Arrange] = {
    "claimed_but_nothing_else": partial(interrupt, StoreWriter, "claim", after=True),
    "files_written_but_not_committed": partial(
        interrupt, StoreWriter, "_replace", when=lambda self, base, old, new, marks: bool(new)
    ),
    "committed_but_index_not": partial(interrupt, StoreWriter, "commit", call=2, after=True),
    "index_followed_but_not_committed": partial(interrupt, DuplicateIndex, "follow", call=2, after=True),
    "index_committed_but_refusals_not_published": partial(interrupt, Consumer, "_publish"),
    "some_refusals_of_a_batch_published": partial(setattr, FencedSender, "_send", one_then_die),
    "published_but_not_marked": partial(interrupt, Outbox, "publish", after=True),
    "marking_published": partial(interrupt, Consumer, "_mark_published"),
    "published_but_kafka_not_told": partial(interrupt, Membership, "tell_kafka"),
}
SLEEPS: dict[str, Arrange] = {
    name: partial(interrupt, owner, method, signal.SIGSTOP)
    for name, owner, method in (
        ("before_the_commit", StoreWriter, "commit"),
        ("before_its_sender_is_open", FencedSender, "open"),
        ("between_reading_back_and_sending", FencedSender, "send_all"),
        ("with_its_ownership_checked", FencedSender, "_send"),
    )
}
SLEEPS["between_commit_and_publish"] = partial(
    interrupt, QuarantinePublisher, "publish", signal.SIGSTOP, when=lambda self, claim, rows, *_: bool(rows)
)
PUBLISHING: dict[str, tuple[type, str]] = {
    "before_sending": (KafkaProducer, "send"),
    "sent_but_not_committed": (KafkaProducer, "commit_transaction"),
    "committed_but_not_marked": (Ledger, "mark_published"),
}
"""Where a publisher of events is interrupted: before this call."""


def ingest(settings: Settings, point: str = "") -> None:
    """Ingest until killed or asked to stop."""
    if point:
        (DEATHS | SLEEPS)[point]()
    run_ingest(settings)


def publish(settings: Settings, point: str, number: signal.Signals) -> None:
    """Publish what waits until interrupted, and once more. Its lease expires at once, so that another publisher need
    not wait for it; on a busy machine the broker may take longer to answer than the publisher waits.
    """
    publisher = EventPublisher(settings, Ledger.open(settings.ledger), lease_seconds=0)
    publisher._outbox.sender._seconds = 3.0
    reached = interrupt(*PUBLISHING[point], number)
    again = True
    while again:
        again = not reached.is_set()
        with suppress(BrokerError):
            print(publisher.publish_pending(), flush=True)
