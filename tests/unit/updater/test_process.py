"""The trainer gives way to serving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
from updater.process import be_nice
be_nice(15, idle="idle" in sys.argv)
be_nice(3)
group = Path("/proc/self/autogroup")
print(os.nice(0), group.read_text().split()[-1] if group.exists() else "none", os.sched_getscheduler(0))
"""


def after(*words: str) -> list[str]:
    """Niceness, that of the session, and the scheduling policy of a process in a session of its own."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True,
                          start_new_session=True)  # fmt: skip
    return done.stdout.split()


def test_the_trainer_is_nice_as_a_process_and_as_a_session_and_never_goes_back_up() -> None:
    process, session, policy = after()
    assert int(process) == max(15, os.nice(0))
    assert session == (process if Path("/proc/self/autogroup").exists() else "none")
    assert int(policy) == os.sched_getscheduler(0)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="a policy of Linux")
def test_an_idle_trainer_runs_where_nobody_else_wants_to() -> None:
    assert int(after("idle")[2]) == os.SCHED_IDLE
