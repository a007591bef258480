"""Runs a command, and ends all its descendants when it ends, when asked to, or when the parent process is gone. A
script without imports of Ratchet, so that it starts in milliseconds; use :func:`core.child_process.reaped` for the
command line. Signals:

* SIGTERM, SIGINT, SIGHUP: the command gets SIGTERM, once, and ends when it is done.
* SIGQUIT: everything is killed now.

On Linux orphans become children of this process (a "subreaper") whatever session or group they made, as those of Ray
and HAProxy do. Elsewhere only the command's process group is found.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

LOOK_SECONDS = 0.5
"""Interval of checks for the parent, whose death is not signalled."""
KILL_SECONDS = 15.0
"""Limit on killing: a process that waits for a disk dies later."""
LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(parent: int, seconds: float, command: list[str]) -> int:
    """Run the command; returns its ``waitpid`` status. When the process ``parent``, which started this one, is gone,
    the command is asked to end within ``seconds``."""
    reader = _receive_signals()
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = _start(command)
    asked, deadline, status = False, float("inf"), None
    while status is None and time.monotonic() < deadline:
        select.select([reader], [], [], LOOK_SECONDS)
        numbers = _read(reader)
        status = _reap().get(pid)
        if status is not None or signal.SIGQUIT in numbers:
            break
        orphaned = os.getppid() != parent
        if orphaned and deadline == float("inf"):
            deadline = time.monotonic() + seconds
        if not asked and (orphaned or any(number in numbers for number in ASKED)):
            asked = True
            os.kill(pid, signal.SIGTERM)
    killed = _kill_all(pid)
    return status if status is not None else killed.get(pid, signal.SIGKILL)


def _receive_signals() -> int:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*ASKED, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reader


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except BlockingIOError:
        return b""


def _start(command: list[str]) -> int:
    own = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        if LINUX:  # also ends it when this process is killed, and cannot do so itself
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == own:
            os.execvp(command[0], command)  # noqa: S606  the command of the caller
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _reap() -> dict[int, int]:
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = status


def _kill_all(command: int) -> dict[int, int]:
    """Kill until none is left: a killed process may have started another just before."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        left = descendants(os.getpid()) if LINUX else [-command]  # negative: a process group
        for pid in list(left):
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                left.remove(pid)
        ended |= _reap()
        if not left:
            break
        time.sleep(0.01)
    return ended


def descendants(root: int) -> list[int]:
    """Living descendants of a process. Needs /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  without pathlib it starts sooner
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:  # it has ended
                continue
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


def _exit(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        code = 128 - code  # a signal that does not kill by default
    os._exit(code)


if __name__ == "__main__":
    _exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
