"""Waiting ends with the condition, with the time, or with what is waited for."""

from __future__ import annotations

from ops.waiting import wait_until


def test_a_condition_is_asked_until_it_is_true() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 60, pause=0)
    assert not list(answers)


def test_a_condition_is_asked_at_least_once() -> None:
    assert wait_until(lambda: True, 0, alive=lambda: False)


def test_a_process_that_ended_is_not_waited_for() -> None:
    assert not wait_until(lambda: False, 60, alive=lambda: False)


def test_waiting_ends_with_the_time() -> None:
    assert not wait_until(lambda: False, 0)
