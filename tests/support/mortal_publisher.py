"""A publisher of events that kills or stops itself at a chosen point, for the tests of the outbox.

Its lease expires at once, so that another publisher need not wait for it. After a stop it resumes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer

from core.errors import BrokerError
from core.ledger import Ledger
from core.settings import Settings
from streams.kafka.events import EventPublisher

#: Where it ends or sleeps, right before the call.
POINTS: dict[str, tuple[type, str]] = {
    "before_sending": (KafkaProducer, "send"),
    "sent_but_not_committed": (KafkaProducer, "commit_transaction"),
    "committed_but_not_marked": (Ledger, "mark_published"),
}


def interrupt(kind: type, name: str, number: signal.Signals) -> None:
    method: Callable[..., Any] = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(kind, name, method)
        os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(kind, name, call)


def run(settings: Settings, point: str, number: signal.Signals) -> None:
    """Publish what waits until interrupted, and once more. On a busy machine the broker may take longer to answer than
    the publisher waits.

    Args:
        point: one of :data:`POINTS`.
        number: SIGKILL or SIGSTOP.
    """
    publisher = EventPublisher(settings, Ledger.open(settings.ledger), lease_seconds=0)
    publisher._outbox.sender._seconds = 3.0
    kind, name = POINTS[point]
    method = getattr(kind, name)
    interrupt(kind, name, number)
    again = True
    while again:
        again = getattr(kind, name) is not method
        with suppress(BrokerError):
            print(publisher.publish_pending(), flush=True)
