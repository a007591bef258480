"""The trainer gives way to serving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
from pathlib import Path
from updater.process import be_nice
be_nice(15)
be_nice(3)
group = Path("/proc/self/autogroup")
print(os.nice(0), group.read_text().split()[-1] if group.exists() else "none")
"""


def test_the_trainer_is_nice_as_a_process_and_as_a_session_and_never_goes_back_up() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
                          start_new_session=True)  # fmt: skip
    process, session = done.stdout.split()
    assert int(process) == 15
    assert session == ("15" if Path("/proc/self/autogroup").exists() else "none")
