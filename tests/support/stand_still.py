"""Run a command on a machine that pauses now and then, as a shared one does, to find tests that depend on timing.

    .venv/bin/python -m tests.support.stand_still --seconds 4 --every 20 -- bash .ci/run

Every process of the command sleeps (SIGSTOP) for ``--seconds``, on average once in ``--every`` seconds, including those
that left its session, as servers do: all inherit an environment variable.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from tests.support.leftovers import left_running, mark


def stand_still(variable: Mapping[str, str], seconds: float) -> None:
    stopped: list[psutil.Process] = []
    try:
        for _ in range(2):  # also what they start meanwhile; one that waits for a disk stops later by itself
            for process in left_running(variable):
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_STOPPED:
                        process.suspend()
                        stopped.append(process)
        time.sleep(seconds)
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()


def run(command: Sequence[str], seconds: float, every: float) -> int:
    variable = mark()
    with subprocess.Popen(command, env=os.environ | variable) as child:
        while True:
            try:
                return child.wait(random.uniform(0.5, 1.5) * every)
            except subprocess.TimeoutExpired:
                stand_still(variable, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long it stands still")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one time to the next, on average")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    chosen = parser.parse_args()
    return run(chosen.command, chosen.seconds, chosen.every)


if __name__ == "__main__":
    sys.exit(main())
