"""A clock for tests."""

from __future__ import annotations


class Clock:
    """Time that stands still until it is moved. Seconds."""

    now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let that much of it pass at once."""
        self.now += seconds
