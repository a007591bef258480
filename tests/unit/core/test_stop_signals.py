from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BEGIN = """
import os, signal, sys, time
from core.stop_signals import Stopped, stop_on_signals, undisturbed

def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)

stop_on_signals()
"""


def run(script: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
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


@pytest.mark.parametrize("early", [True, False], ids=["before it listens", "later"])
def test_a_closed_terminal_counts_as_a_signal_also_where_the_kernel_tells_another_process(early: bool) -> None:
    script = f"""
import os, pty, sys, time
from core.stop_signals import Stopped, stop_on_signals

ours, theirs = pty.openpty()
os.dup2(theirs, 1)
try:
    if {early}:
        os.close(ours)
    stop_on_signals()
    if not {early}:
        os.close(ours)
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
