"""Queries of the compute budget: a token bucket in MAF-GFLOPs that survives restarts and clock jumps."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.errors import LedgerError
from core.ledger.database import Queries
from core.ledger.rows import BucketRow, ChargeRow


class BudgetQueries(Queries):
    """``rate`` is the refill in MAF-GFLOPs per second, ``capacity`` the most that can be saved."""

    def bucket_level(self, now: float, rate: float, capacity: float) -> float:
        """The amount available at ``now`` (seconds since 1970). A clock that goes back never refills, and time counts
        again after at most one full refill."""
        with self.database.write() as session:
            return _refill(session, now, rate, capacity).level

    def charge(self, key: str, amount: float, *, now: float, rate: float, capacity: float) -> bool:
        """Take ``amount`` for ``key`` if available. A key is charged once: repeating is True and free."""
        with self.database.write() as session:
            bucket = _refill(session, now, rate, capacity)
            if session.get(ChargeRow, key) is not None:
                return True
            if amount > bucket.level:
                return False
            bucket.level -= amount
            session.add(ChargeRow(key=key, amount=amount))
            return True

    def settle(self, key: str, actual: float, *, capacity: float) -> None:
        """Replace a charge by the actual amount, once; the difference is returned or taken (debt is allowed)."""
        with self.database.write() as session:
            bucket = _locked(session)
            charge = session.get(ChargeRow, key)
            if charge is None:
                raise LedgerError(f"nothing was charged for {key!r}.", "Charge before you settle.")
            if charge.settled:
                return
            if bucket is not None:
                bucket.level = min(capacity, bucket.level + charge.amount - actual)
            charge.amount, charge.settled = actual, True

    def spent(self, key: str | None = None) -> float:
        query = select(func.sum(ChargeRow.amount))
        if key is not None:
            query = query.where(ChargeRow.key == key)
        return self._first(query) or 0.0


def _refill(session: Session, now: float, rate: float, capacity: float) -> BucketRow:
    bucket = _locked(session) or _create(session, now, capacity)
    elapsed = now - bucket.refilled_at
    if elapsed > 0:
        bucket.level = min(capacity, bucket.level + elapsed * rate)
        bucket.refilled_at = now
    # A clock that was far ahead gave at most a full bucket: wait for that much, not until the far date.
    if rate > 0:
        bucket.refilled_at = min(bucket.refilled_at, now + capacity / rate)
    return bucket


def _locked(session: Session) -> BucketRow | None:
    """The bucket, locked until this transaction ends (SQLite locks the whole file anyway)."""
    return session.get(BucketRow, 1, with_for_update=True)


def _create(session: Session, now: float, capacity: float) -> BucketRow:
    try:
        with session.begin_nested():
            session.add(BucketRow(id=1, level=capacity, refilled_at=now))
    except IntegrityError:  # another process was faster
        session.expire_all()
    return session.get_one(BucketRow, 1, with_for_update=True)
