"""A record that kills the process that validates it; such a process imports this and not the tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from streams.ingest import validators
from streams.ingest.validate import Accepted, Received, StoreRow

DEADLY = b"deadly"
"""The key of such a record."""


def die_over(records: Sequence[Received]) -> list[Accepted | StoreRow]:
    """In the process: end as a crash of a decoder would."""
    [deadly] = [received for received in records if received.key == DEADLY]
    with validators._notes.validating(deadly.record_position):
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")
