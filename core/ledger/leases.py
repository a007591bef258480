"""Queries of leases: the right to do a job that one process at a time does.

A lease has an epoch that grows with each new holder. A holder that slept past the end of its lease still thinks that
it has it; so each write of the job carries the epoch, and :func:`check_lease` refuses it in the same transaction.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.errors import LeaseLost
from core.ledger.database import Queries
from core.ledger.rows import LeaseRow, utc_now

log = logging.getLogger(__name__)
CONTROLLER_LEASE: Final = "controller"
"""The right to change what is live: to advance proposals and to commit releases."""


class LeaseQueries(Queries):
    """Compare-and-set on a row for each lease. Times are those of the database server, where it has a clock."""

    def acquire_lease(self, name: str, holder: str, seconds: float) -> int | None:
        """Take a lease that is free, or has run out. Returns its epoch, or None while another process holds it.

        Args:
            name: of the job, e.g. ``events``.
            holder: names this process and no other, also not one after it: host, process id and something random.
                The holder itself gets its epoch again, and its time starts again.
            seconds: it runs out after that, unless it is renewed.
        """
        try:
            with self.database.write() as session:
                now = database_time(session)
                row = session.get(LeaseRow, name, with_for_update=True)
                if row is None:
                    row = LeaseRow(name=name, holder=holder, epoch=1, expires_at=now)
                    session.add(row)
                elif row.holder != holder:
                    if row.expires_at > now:
                        return None
                    row.holder, row.epoch = holder, row.epoch + 1
                row.expires_at = now + timedelta(seconds=seconds)
                session.flush()
                return row.epoch
        except IntegrityError:  # two took it at once where there was no row to lock: the other one won
            return None

    def renew_lease(self, name: str, epoch: int, seconds: float) -> bool:
        """Let a lease run for ``seconds`` from now. False when another process took it since."""
        with self.database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is None or row.epoch != epoch:
                return False
            row.expires_at = database_time(session) + timedelta(seconds=seconds)
            return True

    def release_lease(self, name: str, epoch: int) -> None:
        """Give a lease back before it runs out; nothing happens when another process has it."""
        with self.database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is not None and row.epoch == epoch:
                # The next holder is always a new one: what this one left unfinished carries an outdated epoch.
                row.holder, row.expires_at = "", database_time(session)

    def lease(self, name: str) -> LeaseRow | None:
        """The holder of a lease, or its last one; the holder is empty when it was given back."""
        return self._get(LeaseRow, name)


def check_lease(session: Session, name: str, epoch: int) -> None:
    """Refuse what this transaction is about to write unless the lease still has this epoch.

    The lease's row is locked until the transaction ends, so that no other process takes the lease meanwhile.

    Raises:
        LeaseLost: another process took it.
    """
    row = session.get(LeaseRow, name, with_for_update=True)
    if row is None or row.epoch != epoch:
        raise LeaseLost(
            f"the lease {name!r} with epoch {epoch} was lost to {row.holder if row and row.holder else 'nobody yet'}.",
            "Nothing needs to be done: the process that took over goes on with the job.",
        )


def database_time(session: Session) -> datetime:
    """The database server's time; with SQLite this machine's."""
    if session.get_bind().dialect.name != "postgresql":
        return utc_now()
    now: datetime = session.execute(text("select clock_timestamp()")).scalar_one()
    return now


@contextmanager
def renewing(ledger: LeaseQueries, name: str, epoch: int, seconds: float) -> Iterator[None]:
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
