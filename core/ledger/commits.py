"""Writes whose COMMIT may be lost: they are looked up and, if they were not carried out, repeated.

A connection that is lost during COMMIT leaves it open whether the server has carried it out. Each write that goes
through :func:`write_once` takes :func:`lock_releases` first. A second attempt gets that lock only when the first one
has ended on the server, one way or the other; so what the second attempt then reads is final.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from sqlalchemy import text
from sqlalchemy.orm import Session

from core.errors import CommitUnknown, LedgerUnavailable
from core.ledger.database import Database

LOOKUP_SECONDS: Final = 5.0
"""How long the outcome of a COMMIT is looked for; a server that was restarted is back in one or two."""
RELEASE_LOCK: Final = 7241957313
"""Any fixed number: releases, proposals and holds are written one after the other, whoever writes them."""
PAUSE_SECONDS: Final = 0.1

Result = TypeVar("Result")


def lock_releases(session: Session) -> None:
    """Let nobody else write releases, proposals or holds until this transaction ends. SQLite has one writer anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("select pg_advisory_xact_lock(:key)"), {"key": RELEASE_LOCK})


def write_once(database: Database, transaction: Callable[[Session, bool], Result], subject: str) -> Result:
    """Carry out a transaction exactly once, though the answer to its COMMIT may be lost.

    Args:
        transaction: gets the session, under :func:`lock_releases`, and whether an earlier attempt may have been
            carried out. If so it returns what that attempt has written, where it finds it.
        subject: what is written, for the message of an error.

    Raises:
        CommitUnknown: the database did not come back within :data:`LOOKUP_SECONDS`.
        LedgerUnavailable: the database is away, and nothing was written.
    """
    deadline, repeated = 0.0, False
    while True:
        try:
            with database.write() as session:
                lock_releases(session)
                return transaction(session, repeated)
        except LedgerUnavailable as error:
            if not repeated:
                if not isinstance(error, CommitUnknown):
                    raise
                deadline, repeated = time.monotonic() + LOOKUP_SECONDS, True
            if time.monotonic() >= deadline:
                raise CommitUnknown(
                    f"whether {subject} was written is unknown: {error.message}",
                    "Look it up when the ledger is back (`ratchet releases list`), before you decide again.",
                ) from error
        time.sleep(PAUSE_SECONDS)
