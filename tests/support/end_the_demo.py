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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.addresses import free_port
from core.waiting import wait_until
from tests.support.leftovers import left_running, mark, take_terminal

SECONDS = 240.0
"""Limit for ending: parts may take 40 seconds, and a busy machine several times as long."""
PORTS = ("SERVE__PORT", "INGEST__METRICS_PORT", "MAINTAIN__METRICS_PORT", "UPDATER__METRICS_PORT")
Way = Callable[[int], None]


def to_the_group(pid: int) -> None:
    """SIGTERM to make and its group, as `timeout` sends it; make forwards it once more."""
    os.killpg(pid, signal.SIGTERM)


def two_at_once(pid: int) -> None:
    os.killpg(pid, signal.SIGTERM)
    os.killpg(pid, signal.SIGINT)


def while_it_stops(pid: int) -> None:
    for _ in range(6):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGINT)
        time.sleep(random.uniform(0, 1.5))


def killed(pid: int) -> None:
    """SIGKILL to the demo itself, or to make if the demo has not started yet."""
    children = psutil.Process(pid).children()
    (children[0] if children else psutil.Process(pid)).kill()


def closed_terminal(_pid: int) -> None:
    """Close its terminal (done by the caller)."""


WAYS: tuple[Way, ...] = (to_the_group, two_at_once, while_it_stops, killed, closed_terminal)


@dataclass(frozen=True)
class Ended:
    during: str
    seconds: float
    left: tuple[str, ...]
    """Command lines of processes that still ran and were then killed."""


def end_one(folder: Path, way: Way, moment: float) -> Ended:
    """Start the demo in a terminal, and end it after this many seconds."""
    makefile, output = folder.with_name("Makefile"), bytearray()
    ratchet = Path(sys.executable).with_name("ratchet")
    makefile.write_text(f"demo:\n\t@{ratchet} demo --folder {folder}\n")
    variable = mark()
    environ = os.environ | variable | {f"RATCHET_{name}": str(free_port()) for name in PORTS}
    environ["RATCHET_KAFKA__BOOTSTRAP"] = f"127.0.0.1:{free_port()}"
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        ["make", "-f", str(makefile), "demo"], env=environ, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)

    def read() -> bool:
        with suppress(OSError):
            while chunk := os.read(ours, 65536):
                output.extend(chunk)
        return process.poll() is not None

    wait_until(read, moment)
    during = _last_log(folder) if process.poll() is None else f"ended with {process.returncode} before"
    began = time.monotonic()
    if process.poll() is None:
        way(process.pid)
    if way is closed_terminal:
        os.close(ours)
        read = lambda: process.poll() is not None  # noqa: E731
    wait_until(lambda: read() and not left_running(variable, str(folder)), SECONDS)
    seconds = time.monotonic() - began
    left = []
    for each in left_running(variable, str(folder)):
        with suppress(psutil.Error):
            left.append(f"{each.pid} {' '.join(each.cmdline())}")
            each.kill()
    process.wait()
    if way is not closed_terminal:
        os.close(ours)
    return Ended(during, seconds, tuple(left))


def _last_log(folder: Path) -> str:
    written = [path.stem for path in sorted((folder / "logs").glob("*.log")) if path.stat().st_size]
    return ", ".join(written) or "before the parts"


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument("--moments", type=int, default=30, help="in each way (30)")
    parser.add_argument("--within", type=float, default=240.0, help="seconds from the start to the latest moment (240)")
    parser.add_argument("--ways", nargs="+", default=[way.__name__ for way in WAYS], help="some of them (all)")
    parser.add_argument("--folder", type=Path, help="where the demo keeps everything (a temporary folder)")
    chosen = parser.parse_args()
    total, demos = 0, 0
    with tempfile.TemporaryDirectory(prefix="end-the-demo-") as temporary:
        folder = (chosen.folder or Path(temporary) / "demo").resolve()
        for number in range(chosen.moments):
            for way in (each for each in WAYS if each.__name__ in chosen.ways):
                demos += 1
                if demos % 2:
                    shutil.rmtree(folder / "data", ignore_errors=True)
                if demos % 7 == 0:
                    shutil.rmtree(folder / "bases", ignore_errors=True)
                shutil.rmtree(folder / "logs", ignore_errors=True)
                moment = random.uniform(0, chosen.within)
                ended = end_one(folder, way, moment)
                total += len(ended.left)
                print(
                    f"{number + 1:3d} {way.__name__:16} at {moment:5.1f} s  ended in {ended.seconds:5.1f} s  "
                    f"left {len(ended.left)}  ({ended.during})",
                    *(f"\n      {line[:200]}" for line in ended.left), flush=True,
                )  # fmt: skip
    print(f"{demos} demos ended, {total} processes left")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
