"""Keeps a lease while its holder works."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from core.ledger.ledger import Ledger

log = logging.getLogger(__name__)


@contextmanager
def renewing(ledger: Ledger, name: str, epoch: int, seconds: float) -> Iterator[None]:
    """Renew a lease in a thread for as long as the block takes."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / 4):
            try:
                ledger.renew_lease(name, epoch, seconds)
            except Exception as error:  # the ledger is away: the lease may run out, and another process takes it
                log.warning("the lease %s is not renewed: %s", name, error)

    thread = threading.Thread(target=renew, name=f"{name}-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
