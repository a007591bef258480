"""A signal that asks a command to stop is heard once, and always."""

from __future__ import annotations

import signal
import subprocess
import sys
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
    """What a script says that begins as a command does."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_what_runs_at_the_end_is_not_broken_off_by_a_second_signal() -> None:
    said = run("""
try:
    try:
        ask()
        time.sleep(60)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            ask(number)
        print("stopped in order")
except Stopped as stopped:
    print(stopped)
""")
    assert said == "stopped in order\nasked to end by SIGTERM\n"


def test_one_that_the_kernel_gives_to_another_thread_is_heard_while_the_main_one_waits() -> None:
    """As while the main thread starts a process, and takes no signals: Python does not tell it of what others got."""
    said = run("""
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
""")
    assert said == "stopped\n"


def test_a_process_that_was_forked_keeps_its_signals_to_itself() -> None:
    said = run("""
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
""")
    assert said == "goes on\n"


def test_what_must_not_be_half_done_is_done_first() -> None:
    said = run("""
try:
    with undisturbed():
        with undisturbed():
            ask()
        print("done")
    print("never")
except Stopped:
    print("stopped")
""")
    assert said == "done\nstopped\n"


def test_no_handler_of_errors_takes_it_for_one() -> None:
    said = run("""
try:
    try:
        ask()
    except Exception:
        print("never")
except Stopped:
    print("stopped")
""")
    assert said == "stopped\n"


def test_a_signal_that_comes_while_a_finalizer_runs_is_not_lost() -> None:
    said = run("""
class Finalized:
    def __del__(self):
        ask()
        print("never")

try:
    Finalized()
    time.sleep(60)
except Stopped:
    print("stopped")
""")
    assert said == "stopped\n"


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
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=_attend
    )
    assert (done.returncode, done.stderr) == (0, "asked to end by SIGHUP\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    script = "ask(signal.SIGHUP)\nprint('goes on')"
    assert run(script, preexec_fn=_ignore) == "goes on\n"


def _ignore() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _attend() -> None:
    """These tests may be run by nohup themselves."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
