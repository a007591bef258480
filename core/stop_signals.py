"""Signals that ask a command to stop: the first one raises, later ones change nothing.

An exception that a signal raises while cleanup runs would break the cleanup off, and two signals are common: `make`
passes one on that the whole group got already, and people press Ctrl-C twice.
"""

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
"""After so long the process ends whatever it is doing: twice as long as parts have to stop."""


LOOK_SECONDS = 1.0
AGAIN_SECONDS = 0.1
OUTPUTS = (1, 2)


class Stopped(BaseException):
    """A signal asked this process to end. Not an Exception, so that nothing takes it for an error that it handles."""

    def __init__(self, number: int) -> None:
        super().__init__(f"asked to end by {signal.Signals(number).name}")
        self.number = number


@dataclass
class _State:
    number: int = 0
    """The first signal; 0 before it came."""
    raised: bool = False
    undisturbed: int = 0
    """Depth of blocks that no signal may break off."""


_state = _State()


def stop_on_signals() -> None:
    """From now on the first of SIGTERM, SIGINT and SIGHUP raises :class:`Stopped` in the main thread.

    What was ignored when the process started, such as SIGHUP below ``nohup``, stays so. A terminal that is closed
    counts as SIGHUP: the kernel tells the first process of a session alone, and `make`, for one, tells no other.
    """
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
    """Inside, a signal that asks to stop waits for the end of the block. For what must not be half done, as starting
    something that has to be stopped. Use it in the main thread.
    """
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
    """Repeat to the main thread, which alone runs handlers, what it may not have noticed.

    Python notes a signal, and looks at its notes when it waits for nothing: one that another thread got, because the
    main one took none while it started a process, or that came just before the main one began to wait, is heard only
    when that wait is over.
    """
    while True:
        for number in os.read(arrivals, 1):
            while not _state.number and signal.getsignal(number) is _ask:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                time.sleep(AGAIN_SECONDS)


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """Repeat a signal that came while a finalizer ran: Python drops what the handler raised there."""
    if not isinstance(lost.exc_value, Stopped):
        sys.__unraisablehook__(lost)
        return
    _state.raised = False
    threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), lost.exc_value.number)).start()


def _is_terminal(descriptor: int) -> bool:
    """Also one that was closed while this process was starting, which says that it is none."""
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
    for descriptor in terminals:  # what is said while the parts are stopped must not fail
        os.dup2(null, descriptor)
    os.close(null)
    os.kill(os.getpid(), signal.SIGHUP)


def _raise_if_due() -> None:
    if _state.number and not _state.raised and not _state.undisturbed:
        _state.raised = True
        raise Stopped(_state.number)


def _end_at_last() -> None:
    """Cleanup hangs, or something swallowed the exception: what runs below a reaper, or watches its parent, ends."""
    time.sleep(LAST_SECONDS)
    os._exit(128 + _state.number)
