"""The processes of one server, found by its Ray session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from core.settings import Settings
from serving.ray.ray_session import is_engine, session_directory


def session_pids(settings: Settings, *names: str) -> list[int]:
    """Processes of a home's session whose command contains one of the names; all when none is given."""
    mark = str(session_directory(settings)).encode()
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        ours = (
            mark in command
            or (mark in environment and command.startswith(b"ray::"))
            or is_engine(int(entry.name), mark)
        )
        if ours and (not names or any(name.encode() in command for name in names)):
            pids.append(int(entry.name))
    return pids


def engine_pids(settings: Settings) -> list[int]:
    mark = str(session_directory(settings)).encode()
    return [pid for pid in session_pids(settings) if is_engine(pid, mark)]


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """True if a process still has its files and sockets; a zombie has none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
