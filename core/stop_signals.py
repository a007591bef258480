"""Stop signals of a command: the first one raises an exception, later ones are ignored. A second exception during
cleanup would interrupt it, and two signals are common: `make` passes on one that the whole group received already, and
people press Ctrl-C twice."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAST_SECONDS = 90.0
"""After this time the process exits unconditionally: twice the time that parts have to stop."""


LOOK_SECONDS = 1.0
AGAIN_SECONDS = 0.1
OUTPUTS = (1, 2)


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"asked to end by {signal.Signals(number).name}")
        self.number = number


@dataclass
class _State:
    number: int = 0
    raised: bool = False
    undisturbed: int = 0


_state = _State()


def stop_on_signals() -> None:
    """Make the first of SIGTERM, SIGINT and SIGHUP raise :class:`Stopped` in the main thread. Signals ignored at
    process start, such as SIGHUP under ``nohup``, stay ignored. A closed terminal counts as SIGHUP: the kernel only
    signals the first process of a session, and `make`, for one, does not pass it on."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _ask)
    sys.unraisablehook = _raise_again
    arrivals, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_pass_on, args=(arrivals,), name="signals", daemon=True).start()
    terminals = [descriptor for descriptor in OUTPUTS if _is_terminal(descriptor)]
    if terminals and signal.SIGHUP in heard:
        threading.Thread(target=_watch, args=(terminals,), name="terminal", daemon=True).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Defer stop signals to the end of the block, for work that must not be half done, such as starting something that
    has to be stopped. Main thread only."""
    _state.undisturbed += 1
    try:
        yield
    finally:
        _state.undisturbed -= 1
        _raise_if_due()


def _ask(number: int, _frame: FrameType | None) -> None:
    if not _state.number:
        _state.number = number
        threading.Thread(target=_end_at_last, name="end-at-last", daemon=True).start()
    _raise_if_due()


def _pass_on(arrivals: int) -> None:
    """Resend signals to the main thread, the only one that runs handlers, in case it missed them. Python handles a
    signal when it next runs bytecode: one delivered to another thread, because the main thread was starting a process,
    or just before the main thread began to wait, is only handled after that wait."""
    while True:
        for number in os.read(arrivals, 1):
            while not _state.number and signal.getsignal(number) is _ask:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                time.sleep(AGAIN_SECONDS)


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """Repeat a signal that arrived during a finalizer: Python drops what the handler raised there."""
    if not isinstance(lost.exc_value, Stopped):
        sys.__unraisablehook__(lost)
        return
    _state.raised = False
    threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), lost.exc_value.number)).start()


def _is_terminal(descriptor: int) -> bool:
    """True also for a terminal that was closed during startup, which no longer reports as one."""
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return True


def _watch(terminals: list[int]) -> None:
    poll = select.poll()
    poll.register(terminals[0], 0)
    while not poll.poll(LOOK_SECONDS * 1000):
        pass
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:  # output must not fail while the parts are stopped
        os.dup2(null, descriptor)
    os.close(null)
    os.kill(os.getpid(), signal.SIGHUP)


def _raise_if_due() -> None:
    if _state.number and not _state.raised and not _state.undisturbed:
        _state.raised = True
        raise Stopped(_state.number)


def _end_at_last() -> None:
    """Exit in case cleanup hangs, or something swallowed the exception; processes under a reaper, or that watch their
    parent, end too."""
    time.sleep(LAST_SECONDS)
    os._exit(128 + _state.number)
