"""Learning rates: no phase knows how long the stream will be."""

from __future__ import annotations

import math

import pytest

from updater.recipes import Schedule
from updater.schedules import learning_rate

INFINITE = Schedule(peak=1.0, constant=0.1, final=0.01, warmup_steps=10, cooldown_steps=20, anneal_steps=10)


def test_infinite_warms_up_cools_down_stays_and_anneals() -> None:
    rates = [learning_rate(INFINITE, step, 100, first=True) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[19] == pytest.approx((1.0 + 0.1) / 2)  # half of the cosine
    assert rates[30:90] == pytest.approx([0.1] * 60)
    assert rates[99] == pytest.approx(0.01)
    ratios = [rates[i + 1] / rates[i] for i in range(90, 99)]
    assert ratios == pytest.approx([ratios[0]] * 9)  # exponential


@pytest.mark.parametrize("kind", ["infinite", "rsqrt"])
def test_the_rate_before_the_anneal_does_not_depend_on_the_number_of_steps(kind: str) -> None:
    schedule = INFINITE.model_copy(update={"kind": kind})
    short = [learning_rate(schedule, step, 60, first=True) for step in range(50)]
    long = [learning_rate(schedule, step, 5000, first=True) for step in range(50)]
    assert short == long


def test_later_updates_skip_warm_up_and_cool_down() -> None:
    assert learning_rate(INFINITE, 0, 100, first=False) == pytest.approx(0.1)
    assert learning_rate(INFINITE, 99, 100, first=False) == pytest.approx(0.01)


def test_rsqrt_falls_with_the_root_of_the_step() -> None:
    schedule = Schedule(kind="rsqrt", peak=1.0, warmup_steps=4, anneal_steps=0)
    assert learning_rate(schedule, 3, 1000, first=True) == pytest.approx(1.0)
    assert learning_rate(schedule, 99, 1000, first=True) == pytest.approx(math.sqrt(4 / 100))


def test_an_update_shorter_than_its_anneal_still_ends_at_the_final_rate() -> None:
    rates = [learning_rate(INFINITE, step, 3, first=True) for step in range(3)]
    assert rates[-1] == pytest.approx(0.01)
    assert all(rate > 0 for rate in rates)
