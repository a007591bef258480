from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from core.errors import LedgerError
from core.ledger import Ledger
from core.ledger.rows import BucketRow, ChargeRow
from tests.support.ledger_limits import patient, patient_limits
from tests.unit.core.ledger.steps import race

RATE, CAPACITY = 2.0, 100.0
FULL = CAPACITY / RATE
"""Seconds after which an empty bucket is full."""


@dataclass
class Spender:
    """Spends everything available by a clock that may be wrong; tracks the real time."""

    ledger: Ledger
    time: float = 0.0
    clock: float = 1e6
    taken: float = 0.0
    charges: int = 0

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.clock += seconds

    def level(self) -> float:
        return self.ledger.bucket_level(self.clock, RATE, CAPACITY)

    def take_all(self) -> None:
        amount = self.level()
        assert amount <= CAPACITY
        self.charges += 1
        assert self.ledger.charge(f"charge {self.charges}", amount, now=self.clock, rate=RATE, capacity=CAPACITY)
        self.taken += amount


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path_factory.mktemp('budget') / 'ledger.db'}")
    yield opened
    opened.close()


def emptied(ledger: Ledger) -> Spender:
    with ledger.database.write() as session:
        session.execute(delete(ChargeRow))
        session.execute(delete(BucketRow))
    spender = Spender(ledger)
    spender.take_all()
    assert spender.taken == CAPACITY
    return spender


SECONDS = st.floats(0, 3 * FULL)
STEPS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.just(0.0) | st.floats(0, 1e9))
def test_a_clock_that_jumps_mints_at_most_a_full_bucket_and_blocks_no_longer_than_its_refill(
    kept: Ledger, steps: list[tuple[float, float]], ahead: float
) -> None:
    spender = emptied(kept)
    spender.clock += ahead
    spender.take_all()
    assert spender.taken == pytest.approx(CAPACITY + min(CAPACITY, RATE * ahead))
    spender.clock -= ahead
    paid = spender.taken
    for waited, back in steps:
        spender.wait(waited)
        spender.clock -= back
        spender.take_all()
        assert spender.taken <= paid + RATE * spender.time + 1e-6
    spender.wait(2 * FULL)
    assert spender.level() == pytest.approx(CAPACITY)


def test_another_ledger_on_the_same_database_goes_on_where_the_last_one_stood(url: str) -> None:
    with closing(Ledger.open(url)) as first:
        assert first.charge("u1", 80, now=1000, rate=RATE, capacity=CAPACITY)
    with closing(Ledger.open(url)) as second:
        assert second.bucket_level(1005, RATE, CAPACITY) == 30
        assert second.charge("u1", 80, now=1005, rate=RATE, capacity=CAPACITY), "it was charged before the restart"
        second.settle("u1", 50, capacity=CAPACITY)
    with closing(Ledger.open(url)) as third:
        third.settle("u1", 0, capacity=CAPACITY)
        with pytest.raises(LedgerError, match="u9"):
            third.settle("u9", 1, capacity=CAPACITY)
        assert (third.bucket_level(1005, RATE, CAPACITY), third.spent()) == (60, 50)


def test_an_update_that_spent_more_than_it_was_charged_leaves_a_debt_that_time_pays(ledger: Ledger) -> None:
    assert ledger.charge("u1", CAPACITY, now=0, rate=RATE, capacity=CAPACITY)
    ledger.settle("u1", CAPACITY + 40, capacity=CAPACITY)
    assert ledger.bucket_level(10, RATE, CAPACITY) == -20
    assert not ledger.charge("u2", 1, now=10, rate=RATE, capacity=CAPACITY)
    assert ledger.charge("u2", 1, now=21, rate=RATE, capacity=CAPACITY)


def test_of_two_that_charge_at_once_none_spends_what_the_other_has_taken(url: str, ledger: Ledger) -> None:
    """Eighty charges of one from a bucket of fifty; twenty more have the same key in both."""
    with patient_limits():
        other = Ledger.open(patient(url))

    def spend(spender: Ledger, name: str) -> tuple[int, bool]:
        charge = partial(spender.charge, now=0, rate=1e-9, capacity=50)
        own = sum(charge(f"{name} {number}", 1) for number in range(40))
        return own, all(charge(f"shared {number}", 0) for number in range(20))

    taken = race(lambda: spend(ledger, "one"), lambda: spend(other, "other"))
    assert sum(own for own, _ in taken) == 50 and all(shared for _, shared in taken)
    assert ledger.bucket_level(0, 1e-9, 50) == 0
    assert ledger.spent() == 50
    other.close()
