from __future__ import annotations

from types import SimpleNamespace

import pytest

from core.waiting import BUSY_SECONDS, STILL_SECONDS, StoodStill, wait_for_progress, wait_until
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("core.waiting.time", SimpleNamespace(monotonic=made, sleep=made.sleep))
    return made


def test_a_condition_is_asked_once_and_until_it_is_true_the_time_is_over_or_what_is_waited_for_ended() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 60, pause=0)
    assert not list(answers)
    assert wait_until(lambda: True, 0, alive=lambda: False)
    assert not wait_until(lambda: False, 60, alive=lambda: False)
    assert not wait_until(lambda: False, 0)


def test_what_moves_slowly_is_waited_for_however_long_it_takes_and_told_now_and_then(clock: Clock) -> None:
    began, said = clock.now, list[str]()

    def rows() -> int:
        return int((clock.now - began) / (STILL_SECONDS * 0.9))  # one, long after the other

    wait_for_progress(lambda: rows() >= 50, lambda: f"{rows()} of 50 rows", tell=said.append)
    assert clock.now - began > 10 * BUSY_SECONDS / 2
    assert said[0].startswith("1 of 50 rows after") and said[-1].startswith("49 of 50 rows after")
    began, told = clock.now, list[str]()
    wait_for_progress(lambda: clock.now - began > 100, lambda: clock.now, tell=told.append)
    assert 4 <= len(told) <= 7, "what is quick is not told each time"


def test_what_stands_still_is_given_up_and_named(clock: Clock) -> None:
    began = clock.now
    with pytest.raises(StoodStill, match=r"nothing has moved for 12\d s; last: 7 of 50 rows"):
        wait_for_progress(lambda: False, lambda: "7 of 50 rows")
    assert clock.now - began < 2 * STILL_SECONDS


def test_what_computes_without_a_word_has_longer_and_not_for_ever(clock: Clock) -> None:
    began = clock.now
    wait_for_progress(lambda: clock.now - began > 5 * STILL_SECONDS, lambda: "loading", work=lambda: clock.now)
    with pytest.raises(StoodStill, match=r"nothing has come of what is computed for 90\d s; last: loading"):
        wait_for_progress(lambda: False, lambda: "loading", work=lambda: clock.now)
