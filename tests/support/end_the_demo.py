"""End the demo at random moments, in each way in which a demo ends, and look for processes that still run.

    .venv/bin/python -m tests.support.end_the_demo --moments 30 --within 240

The demos share a folder, like those of a user. The pictures are deleted before every other run, and the base before
some, so that many runs end while drawing or building. Prints a line for each moment and then the total. The exit status
is 1 if anything was left running.
"""

from __future__ import annotations

import argparse
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil

from core.addresses import free_port
from core.waiting import wait_until
from tests.support.leftovers import left_running, mark, take_terminal

SECONDS = 240.0
"""Limit for ending: parts may take 40 seconds, and a busy machine several times as long."""
PORTS = ("SERVE__PORT", "INGEST__METRICS_PORT", "MAINTAIN__METRICS_PORT", "UPDATER__METRICS_PORT")
WAYS = ("to the group", "two at once", "while it stops", "killed", "closed terminal")


def end(way: str, pid: int, terminal: int) -> None:
    """End make, which runs the demo."""
    children = psutil.Process(pid).children()
    if way == "killed":  # the demo itself, or make if the demo has not started yet
        (children[0] if children else psutil.Process(pid)).kill()
    elif way == "closed terminal":
        os.close(terminal)
    elif way == "while it stops":
        for _ in range(6):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGINT)
            time.sleep(random.uniform(0, 1.5))
    else:  # as `timeout` sends it; make forwards it once more
        os.killpg(pid, signal.SIGTERM)
        if way == "two at once":
            os.killpg(pid, signal.SIGINT)


def end_one(folder: Path, way: str, moment: float) -> list[str]:
    """Start the demo in a terminal, and end it after this many seconds. Prints how it went; returns the command lines
    of processes that still ran and were then killed.
    """
    makefile, variable = folder.with_name("Makefile"), mark()
    ratchet = Path(sys.executable).with_name("ratchet")
    makefile.write_text(f"demo:\n\t@{ratchet} demo --folder {folder}\n")
    environ = os.environ | variable | {f"RATCHET_{name}": str(free_port()) for name in PORTS}
    environ["RATCHET_KAFKA__BOOTSTRAP"] = f"127.0.0.1:{free_port()}"
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        ["make", "-f", str(makefile), "demo"], env=environ, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)

    def ended() -> bool:
        with suppress(OSError):
            while os.read(ours, 65536):
                continue
        return process.poll() is not None

    wait_until(ended, moment)
    logs = [path.stem for path in sorted((folder / "logs").glob("*.log")) if path.stat().st_size]
    began = time.monotonic()
    if process.poll() is None:
        end(way, process.pid, ours)
    wait_until(lambda: ended() and not left_running(variable, str(folder)), SECONDS)
    seconds, left = time.monotonic() - began, list[str]()
    for each in left_running(variable, str(folder)):
        with suppress(psutil.Error):
            left.append(f"{each.pid} {' '.join(each.cmdline())}")
            each.kill()
    process.wait()
    with suppress(OSError):
        os.close(ours)
    during = ", ".join(logs) or "before the parts"
    print(f"{way:16} at {moment:5.1f} s  ended in {seconds:5.1f} s  left {len(left)}  ({during})", flush=True)
    print(*(f"      {line[:200]}\n" for line in left), sep="", end="", flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30, help="in each way (30)")
    parser.add_argument("--within", type=float, default=240.0, help="seconds from the start to the latest moment (240)")
    chosen = parser.parse_args()
    demos, total = count(1), 0
    with tempfile.TemporaryDirectory(prefix="end-the-demo-") as temporary:
        folder = Path(temporary).resolve() / "demo"
        for way in WAYS * chosen.moments:
            number = next(demos)
            for part, each in (("logs", 1), ("data", 2), ("bases", 7)):
                if number % each == 0:
                    shutil.rmtree(folder / part, ignore_errors=True)
            total += len(end_one(folder, way, random.uniform(0, chosen.within)))
    print(f"{next(demos) - 1} demos ended, {total} processes left")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
