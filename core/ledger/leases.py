"""Queries of leases: the right to do a job that one process at a time does. A lease's epoch grows with each new holder.
A holder that slept past its end still believes it holds it; so each write of the job carries the epoch, and
:func:`check_lease` rejects outdated ones in the same transaction."""

from __future__ import annotations

import logging
import os
import secrets
import socket
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
"""The right to change what is live: to advance proposals and commit releases."""


class LeaseQueries(Queries):
    """Compare-and-set on one row per lease. Times are the database server's, if it has a clock."""

    def acquire_lease(self, name: str, holder: str, seconds: float) -> int | None:
        """Take a free or expired lease for ``seconds``. Returns its epoch, or None while another process holds it.
        ``holder`` is unique to this process, also over time: host, process ID and a random part. The holder itself gets
        its epoch again, with a new expiry."""
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
        except IntegrityError:  # two took it at once with no row to lock: the other one won
            return None

    def renew_lease(self, name: str, epoch: int, seconds: float) -> bool:
        """Extend a lease to ``seconds`` from now. False if another process has taken it."""
        with self.database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is None or row.epoch != epoch:
                return False
            row.expires_at = database_time(session) + timedelta(seconds=seconds)
            return True

    def release_lease(self, name: str, epoch: int) -> None:
        """Release a lease early; no effect if another process has it."""
        with self.database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row is not None and row.epoch == epoch:
                # The next holder always gets a new epoch, so this one's unfinished writes are outdated.
                row.holder, row.expires_at = "", database_time(session)

    def lease(self, name: str) -> LeaseRow | None:
        """The lease's row; the holder is empty after a release."""
        return self._get(LeaseRow, name)

    def lease_is_held(self, name: str) -> bool:
        with self.database.read() as session:
            return is_held(session, name)


def is_held(session: Session, name: str) -> bool:
    """True if a process has the lease now."""
    row = session.get(LeaseRow, name)
    return row is not None and bool(row.holder) and row.expires_at > database_time(session)


def check_lease(session: Session, name: str, epoch: int) -> None:
    """Lock a lease's row until the transaction ends. Raises LeaseLost if it no longer has this epoch, so that the
    transaction's writes are dropped."""
    row = session.get(LeaseRow, name, with_for_update=True)
    if row is None or row.epoch != epoch:
        raise LeaseLost(
            f"the lease {name!r} with epoch {epoch} was lost to {row.holder if row and row.holder else 'no one yet'}.",
            "Nothing needs to be done: the process that took over goes on with the job.",
        )


def database_time(session: Session) -> datetime:
    """The database server's time; for SQLite this machine's."""
    if session.get_bind().dialect.name != "postgresql":
        return utc_now()
    now: datetime = session.execute(text("select clock_timestamp()")).scalar_one()
    return now


def lease_holder() -> str:
    """A name for this process that no other has."""
    return f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(4)}"


@contextmanager
def leased(ledger: LeaseQueries, name: str, seconds: float) -> Iterator[int | None]:
    """Hold a lease inside, and renew it: its epoch, or None while another process has it."""
    epoch = ledger.acquire_lease(name, lease_holder(), seconds)
    if epoch is None:
        yield None
        return
    try:
        with renewing(ledger, name, epoch, seconds):
            yield epoch
    finally:
        ledger.release_lease(name, epoch)


@contextmanager
def renewing(ledger: LeaseQueries, name: str, epoch: int, seconds: float) -> Iterator[None]:
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / 4):
            try:
                ledger.renew_lease(name, epoch, seconds)
            except Exception as error:  # the ledger is unreachable: the lease may expire, and another process take it
                log.warning("the lease %s is not renewed: %s", name, error)

    thread = threading.Thread(target=renew, name=f"{name}-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
