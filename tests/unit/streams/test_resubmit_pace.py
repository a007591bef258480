"""Records are sent again at most so many a second."""

from __future__ import annotations

import pytest

from streams.ingest import resubmit


class Clock:
    """A clock that moves when somebody sleeps."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_rate_is_kept_and_a_pause_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(resubmit, "time", clock)
    pace = resubmit._Pace(4)
    times = []
    for _ in range(3):
        pace.wait()
        times.append(clock.now)
    assert times == [100.0, 100.25, 100.5]
    clock.now = 200.0
    for _ in range(2):
        pace.wait()
        times.append(clock.now)
    assert times[3:] == [200.0, 200.25]
