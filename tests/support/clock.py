"""A clock for tests."""

from __future__ import annotations


class Clock:
    """Time that stands still until it is moved. Seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
