"""A publisher of events that kills or stops itself at a chosen point, for the tests of the outbox.

``python -m tests.support.mortal_publisher SETTINGS POINT kill|stop``; SETTINGS is a JSON file, POINT one of
:data:`POINTS`. Its lease runs out at once, so that another publisher need not wait for it. After a stop it goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kafka import KafkaProducer

from ops.errors import BrokerError
from ops.ledger import Ledger
from ops.settings import Settings
from streams.events import EventPublisher

#: Where it ends or sleeps, right before the call.
POINTS: dict[str, tuple[type, str]] = {
    "before_sending": (KafkaProducer, "send"),
    "sent_but_not_committed": (KafkaProducer, "commit_transaction"),
    "committed_but_not_marked": (Ledger, "mark_published"),
}


def interrupt(kind: type, name: str, number: signal.Signals) -> None:
    """Let the first call of a method be preceded by a signal to this process."""
    method: Callable[..., Any] = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(kind, name, method)
        os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    setattr(kind, name, call)


def main() -> None:
    """Publish what waits, twice."""
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    publisher = EventPublisher(settings, Ledger.open(settings.ledger), lease_seconds=0)
    publisher._outbox.sender._seconds = 3.0
    interrupt(*POINTS[sys.argv[2]], signal.SIGKILL if sys.argv[3] == "kill" else signal.SIGSTOP)
    for _ in range(2):
        with suppress(BrokerError):
            print(publisher.publish_pending(), flush=True)


if __name__ == "__main__":
    main()
