from __future__ import annotations

import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from core import child_process
from core.child_process import ChildProcess, reaped, stop_reaped, tail
from core.waiting import wait_until
from tests.support.leftovers import VARIABLE, left_running, mark, take_terminal

SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what leaves its process group is not found")

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
subprocess.Popen(sleep, start_new_session=True)
print("runs", flush=True)
time.sleep(600)
"""
"""Ignores signals, and so does its child, in its own session."""
LEAVES_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
sys.exit(3)
"""
OBEYS = """
import signal, sys, time
from pathlib import Path
def end(*_):
    time.sleep(0.5)
    Path(sys.argv[1]).write_text("in order")
    sys.exit()
signal.signal(signal.SIGTERM, end)
time.sleep(600)
"""
PARENT = """
import time
from core.child_process import end_with_parent

def main():
    import sys
    from pathlib import Path
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from core import child_process
    from core.child_process import ChildProcess, kill_workers
    from ops.cli import supervisor
    from core.stop_signals import Stopped, stop_on_signals, undisturbed

    child_process.STOP_SECONDS = supervisor.STOP_SECONDS = 2.0
    folder = Path(sys.argv[1])

    class Parts(supervisor.Supervisor):
        def __init__(self, scripts):
            self.parts = [
                ChildProcess(name, [sys.executable, "-c", script, str(folder / name)], folder / f"{name}.log")
                for name, script in scripts.items()
            ]

    stop_on_signals()
    print("begins", flush=True)
    try:
        pool = ProcessPoolExecutor(2, get_context("spawn"), end_with_parent)
        try:
            with undisturbed():
                work = [pool.submit(time.sleep, 600) for _ in range(6)]
            with Parts(eval(sys.argv[2])):
                time.sleep(600)
        finally:
            kill_workers(pool)
    except Stopped:
        pass

if __name__ == "__main__":
    main()
"""
"""Like a command: it has parts, a busy pool, and a terminal."""


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    variable = mark()
    yield {**os.environ, **variable, "PYTHONPATH": str(ROOT)}
    for process in left_running(variable):
        process.kill()


def left(environ: dict[str, str]) -> list[str]:
    found = []
    for process in left_running({VARIABLE: environ[VARIABLE]}):
        with suppress(Exception):
            found.append(" ".join(process.cmdline())[:200])
    return found


def nothing_left(environ: dict[str, str]) -> None:
    assert wait_until(lambda: not left(environ), SECONDS), left(environ)


@linux
def test_what_a_command_leaves_behind_ends_with_it_and_its_status_is_passed_on(marked: dict[str, str]) -> None:
    process = subprocess.Popen(reaped([sys.executable, "-c", LEAVES_A_CHILD]), env=marked)
    assert process.wait(SECONDS) == 3
    assert not left(marked)
    done = subprocess.run(reaped(["/nowhere/at-all"]), capture_output=True, text=True)
    assert done.returncode == 127 and "/nowhere/at-all: No such file" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_a_command_that_a_signal_ended_is_seen_as_that(number: signal.Signals) -> None:
    default = "" if number == signal.SIGKILL else f"signal.signal({number}, signal.SIG_DFL); "
    command = [sys.executable, "-c", f"import os, signal; {default}os.kill(os.getpid(), {number})"]
    assert subprocess.Popen(reaped(command)).wait(SECONDS) == -number


@linux
def test_one_that_does_not_end_when_asked_is_killed_with_all_it_started(marked: dict[str, str]) -> None:
    process = subprocess.Popen(reaped([sys.executable, "-c", STUBBORN]), env=marked, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"runs\n"
    assert len(left(marked)) == 3
    assert not stop_reaped(process, 0.2)
    assert not left(marked)


@linux
def test_a_command_ends_in_order_when_what_started_it_is_killed(marked: dict[str, str], tmp_path: Path) -> None:
    ended, script = tmp_path / "ended", tmp_path / "parent.py"
    obeys = OBEYS.replace("time.sleep(600)", "Path(sys.argv[1]).touch(); time.sleep(600)")
    script.write_text(
        "import subprocess, sys, time\nfrom core.child_process import reaped\n"
        f"subprocess.Popen(reaped([sys.executable, '-c', {obeys!r}, {str(ended)!r}]))\n"
        "print('started', flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env=marked, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    assert wait_until(ended.exists, SECONDS)  # its handler is set
    parent.kill()
    parent.wait()
    nothing_left(marked)
    assert ended.read_text() == "in order"


Signal = tuple[Callable[[int, int], None], signal.Signals, float]
"""Whom it is sent to, and the longest pause before it."""
ENDS: dict[str, list[Signal]] = {
    "to the group, as by timeout": [(os.killpg, signal.SIGTERM, 0)],
    "twice, as by make, which forwards it": [(os.killpg, signal.SIGTERM, 0), (os.kill, signal.SIGTERM, 0)],
    "while it stops, and an impatient Ctrl-C": [
        (os.kill, signal.SIGTERM, 0), (os.killpg, signal.SIGINT, 0.4), (os.killpg, signal.SIGTERM, 0.4),
        (os.killpg, signal.SIGINT, 0.4),
    ],
    "killed, which it cannot handle": [(os.kill, signal.SIGKILL, 0)],
    "closed terminal": [],
}  # fmt: skip


@linux
@pytest.mark.parametrize("moment", [2.0, pytest.param(0.2, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_parts_and_workers_end_with_a_parent(end: str, moment: float, marked: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parts = {"stubborn": STUBBORN, "obeys": OBEYS, "leaves": LEAVES_A_CHILD, "other": OBEYS}
    ours, theirs = pty.openpty()
    command = [sys.executable, str(script), str(tmp_path), repr(parts)]
    if not ENDS[end]:  # below a process that does not forward signals of the kernel, as `make`
        command = ["bash", "-c", f"trap : HUP; {shlex.join(command)}; true"]
    parent = subprocess.Popen(
        command, env=marked, stdin=theirs, stdout=theirs,
        stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    assert b"begins" in os.read(ours, 100)
    time.sleep(random.uniform(0, moment))  # at any point: before, between and after the starts
    for send, number, pause in ENDS[end]:
        time.sleep(random.uniform(0, pause))
        with suppress(ProcessLookupError):
            send(parent.pid, number)
    os.close(ours)
    assert parent.wait(SECONDS) is not None
    nothing_left(marked)


def test_a_part_that_dies_is_started_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "BACKOFF_SECONDS", (0.2,))
    command = [sys.executable, "-c", "print('hello', flush=True); raise SystemExit(3)"]
    part = ChildProcess("part", command, tmp_path / "log")
    part.start()
    assert wait_until(lambda: not part.running, SECONDS, pause=0.02)
    part.restart_dead(time.monotonic())
    assert part.restarts == 0
    assert wait_until(lambda: part.restart_dead(time.monotonic()) or part.restarts == 1, SECONDS, pause=0.02)
    part.stop(time.monotonic() + 5)
    assert not part.running
    assert tail(part.log).count("hello") >= 1


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "STOP_SECONDS", 2.0)


LISTENS = """
import os, signal, sys, time
from core.stop_signals import Stopped, stop_on_signals, undisturbed

def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)

stop_on_signals()
"""


def run(script: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LISTENS + script], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


CASES = {
    # As while the main thread starts a process and takes no signals: Python does not forward those of other threads.
    "one that the kernel gives to another thread is heard while the main one waits": (
        "stopped\n",
        """
import ctypes, threading
keeping_the_lock, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
for _ in range(2):  # the second one waits for the first one, as threads of libraries wait for work
    threading.Thread(target=ctypes.CDLL(None).pthread_mutex_lock, args=(mutex,), daemon=True).start()
try:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    keeping_the_lock.kill(os.getpid(), signal.SIGTERM)
    keeping_the_lock.usleep(200_000)
    keeping_the_lock.pthread_sigmask(signal.SIG_SETMASK, (ctypes.c_ulong * 16)(), None)
    time.sleep(600)
except Stopped:
    print("stopped")
""",
    ),
    "a process that was forked keeps its own to itself": (
        "goes on\n",
        """
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    os.kill(os.getpid(), signal.SIGTERM)
try:
    os.waitpid(child, 0)
    time.sleep(0.5)
    print("goes on")
except Stopped:
    print("stopped")
""",
    ),
    "what must not be half done is done first, later ones change nothing, and no handler of errors takes it for one": (
        "done\nstopped in order\nasked to end by SIGTERM\n",
        """
try:
    try:
        with undisturbed():
            with undisturbed():
                ask()
            print("done")
        print("never")
    except Exception:
        print("never")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            ask(number)
        print("stopped in order")
except Stopped as stopped:
    print(stopped)
""",
    ),
    "one that comes while a finalizer runs is not lost": (
        "stopped\n",
        """
class Finalized:
    def __del__(self):
        ask()
        print("never")

try:
    Finalized()
    time.sleep(60)
except Stopped:
    print("stopped")
""",
    ),
}


@pytest.mark.parametrize(("said", "script"), CASES.values(), ids=CASES)
def test_a_signal_is_heard_once_and_always(said: str, script: str) -> None:
    assert run(script) == said


def test_a_terminal_that_was_closed_before_counts_as_a_signal() -> None:
    script = """
import os, pty, sys, time
from core.stop_signals import Stopped, stop_on_signals

ours, theirs = pty.openpty()
os.dup2(theirs, 1)
os.close(ours)
try:
    stop_on_signals()
    time.sleep(60)
except Stopped as stopped:
    print(stopped, file=sys.stderr)
print("what is said now is lost, and breaks nothing", flush=True)
"""
    attend = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=attend
    )
    assert (done.returncode, done.stderr) == (0, "asked to end by SIGHUP\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    assert run("ask(signal.SIGHUP)\nprint('goes on')", preexec_fn=ignore) == "goes on\n"
