"""Niceness of the catalog's own threads."""

from __future__ import annotations

import os
import sys
import threading
from typing import Final

NICE: Final = 10
"""Of threads that decode and that make indexes: requests come first."""


def step_back() -> None:
    """Let this thread compute after others (Linux has a niceness per thread)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
