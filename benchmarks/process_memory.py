"""Memory of every descendant of this process, such as those of a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SMALL_BYTES = 16 << 20
"""Growth of smaller processes is not reported: a shell's page more or less is meaningless."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process, in bytes: its own pages, and its part of those that it shares with others in memory.

    Pages of files (programs and libraries) are left out, because the kernel can drop and reread them, and because a
    process's part of them shrinks while any other process uses the same libraries.
    """

    name: str
    size: int

    @property
    def is_small(self) -> bool:
        return self.size < SMALL_BYTES


def child_processes(root: int | None = None) -> dict[int, ProcessMemory]:
    """By process ID: all descendants of ``root`` (this process). Empty without /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found: dict[int, ProcessMemory] = {}
    for pid in parents:
        if _descends(pid, root or os.getpid(), parents) and (memory := _read(pid)) is not None:
            found[pid] = memory
    return found


def memory_growth(before: Mapping[int, ProcessMemory], after: Mapping[int, ProcessMemory]) -> dict[str, float]:
    """Size after over size before, by name and ID, the largest first; of processes that lived through both and were not
    small.
    """
    ratios = {
        f"{memory.name} {pid}": round(after[pid].size / memory.size, 4)
        for pid, memory in before.items()
        if pid in after and not memory.is_small
    }
    return dict(sorted(ratios.items(), key=lambda item: -item[1]))


def _descends(pid: int, root: int, parents: Mapping[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == root:
            return True
    return False


def _read(pid: int) -> ProcessMemory | None:
    folder = Path("/proc") / str(pid)
    try:
        command = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        return ProcessMemory(command.rpartition("/")[2][:60], _size(folder))
    except OSError:
        return None


def _size(folder: Path) -> int:
    """Of proportional set sizes (Linux 5.10 and newer), or of resident sets if these cannot be read."""
    for name, keys in (("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")), ("status", ("RssAnon:", "RssShmem:"))):
        try:
            lines = (folder / name).read_text().splitlines()
        except OSError:
            continue
        if sizes := [int(line.split()[1]) for line in lines if line.startswith(keys)]:
            return sum(sizes) * 1024
    return 0
