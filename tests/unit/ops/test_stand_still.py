from __future__ import annotations

import sys
from pathlib import Path

from tests.support import stand_still

GAPS = """
import pathlib, sys, time
longest, before = 0.0, time.monotonic()
while longest < 0.5:
    time.sleep(0.01)
    now = time.monotonic()
    longest, before = max(longest, now - before), now
pathlib.Path(sys.argv[1]).write_text(str(longest))
"""
START = """
import subprocess, sys
gaps = [subprocess.Popen([sys.executable, "-c", sys.argv[1], path], start_new_session=True) for path in sys.argv[2:]]
sys.exit(sum(gap.wait() for gap in gaps) + 7)
"""


def test_all_processes_of_a_command_stand_still_and_its_exit_code_is_passed_on(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "other")]
    command = [sys.executable, "-c", START, GAPS, *map(str, paths)]
    assert stand_still.run(command, seconds=0.6, every=0.5) == 7
    assert all(float(path.read_text()) >= 0.5 for path in paths)
