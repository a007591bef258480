"""Processes that end or stop themselves with a signal at a chosen call."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, NoReturn


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


def interrupt(
    owner: Any, name: str, number: signal.Signals = signal.SIGKILL, *, call: int = 1, after: bool = False,
    when: Callable[..., bool] = lambda *_, **__: True,
) -> threading.Event:  # fmt: skip
    """Let this process get a signal right before (or after) the ``call``-th call of a function of ``owner`` that has
    arguments with which ``when`` holds. After SIGSTOP it goes on once it is continued. Returns whether it was reached.
    """
    function, calls, reached = getattr(owner, name), count(1), threading.Event()

    def interrupted(*args: Any, **options: Any) -> Any:
        due = when(*args, **options) and next(calls) == call
        if due:
            reached.set()
        if due and not after:
            os.kill(os.getpid(), number)
        result = function(*args, **options)
        if due and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, interrupted)
    return reached
