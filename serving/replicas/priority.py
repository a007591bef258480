"""Priorities of serving's processes on one machine."""

from __future__ import annotations

import os
from typing import Final

MODEL_NICE: Final = 4
"""Of processes that compute: where processors are scarce, those that carry requests and operator calls come first. With
the same niceness a rollback took 1.5 s on two cores that four models kept busy."""


def give_way() -> None:
    """Lower this process's priority to that of models, before it starts threads and processes: they inherit it."""
    missing = MODEL_NICE - os.nice(0)
    if missing > 0:
        os.nice(missing)
