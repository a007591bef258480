"""Export of the metrics to Prometheus. Serving runs in several processes. With ``PROMETHEUS_MULTIPROC_DIR`` set before
the first import, the processes of one machine share a folder, whose disk may be full, and :func:`exposition` aggregates
them. Ingest, maintenance and the updater are one process each, and listen on their own port.

Every process imports all declarations, and metrics without labels exist with the value 0 from then on. A part therefore
only exports its own: serving must not say that the broker is down.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    mmap_dict,
    multiprocess,
    start_http_server,
    values,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger("ratchet.metrics")
Process = Literal["ingest", "maintain", "update", "index", "serve"]
NAME_PREFIXES: dict[Process, tuple[str, ...]] = {
    "ingest": ("ratchet_ingest_", "ratchet_store_"),
    "maintain": ("ratchet_maintain_", "ratchet_deletion", "ratchet_events_", "ratchet_index_"),
    "update": ("ratchet_update", "ratchet_budget_", "ratchet_gate_"),
}
"""Name prefixes that only one part exports; serving exports all others."""
SHARED: tuple[str, ...] = ("ratchet_build_info", "ratchet_dependency_state")
"""Exported by every part: its version, and the state of its dependencies."""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
INITIAL_BYTES: Final = 1 << 16
"""prometheus_client's initial file size, which it doubles from there."""
RETRY_SECONDS: Final = 10.0


def exposition(part: Process) -> bytes:
    return generate_latest(_registry(part, _own_folder()))


def listen(part: Process, port: int, host: str = "127.0.0.1", folder: Path | None = None) -> None:
    """Serve the metrics of this process, or of those that share ``folder``; port 0 is off."""
    if port:
        start_http_server(port, addr=host, registry=_registry(part, folder or _own_folder()))


def belongs(name: str, part: Process) -> bool:
    """True if a part exports a metric. Ray's own processes write into the same folder, but are scraped from Ray. vLLM
    has no port, so its metrics are exported with its replica's."""
    if name in SHARED:
        return True
    if name.startswith("ratchet_"):
        return part == next((each for each, starts in NAME_PREFIXES.items() if name.startswith(starts)), "serve")
    return part != "serve" or name.startswith("vllm:")


class _Own(Collector):
    def __init__(self, part: Process, folder: Path | None) -> None:
        self.part = part
        self.folder = folder
        self.whole: Collector = (
            REGISTRY if folder is None else multiprocess.MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]
        )

    def collect(self) -> Iterable[Metric]:
        if self.folder is not None:
            _forget_the_dead(self.folder)
        return [metric for metric in self.whole.collect() if belongs(metric.name, self.part)]


def _registry(part: Process, folder: Path | None) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Own(part, folder))
    return registry


def _own_folder() -> Path | None:
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


def _forget_the_dead(folder: Path) -> None:
    """Remove the gauges of killed processes, such as requests in flight or an old release. If no writer is visible they
    may be in another container, and none counts as dead."""
    endings = (file.stem.rpartition("_")[2] for file in folder.glob("gauge_live*_*.db"))
    writers = {int(ending) for ending in endings if ending.isdigit()}
    alive = {pid for pid in writers if _runs(pid)}
    if not alive - ({os.getpid()} if _own_folder() is None else set()):
        return
    for pid in writers - alive:
        with contextlib.suppress(FileNotFoundError):  # another scrape was faster
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _runs(pid: int) -> bool:
    with contextlib.suppress(PermissionError):  # it runs, under another user
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


class AllocatedDict(mmap_dict.MmapedDict):
    """A file-backed dictionary of doubles that survives a full disk. prometheus_client maps sparse files into memory,
    and writing to one on a full disk kills the process (SIGBUS). So blocks are allocated before they are mapped, and
    values without room are kept in memory, not exported, until there is some."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._path = Path(filename)
        self._read_mode = read_mode
        self._waiting: dict[str, tuple[float, float]] = {}
        self._retry_at = 0.0
        self._f: Any = None
        self._positions: dict[str, int] = {}
        self._has_file()

    def read_value(self, key: str) -> tuple[float, float]:
        if self._has_room(key):
            value: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
            return value
        return self._waiting.setdefault(key, (0.0, 0.0))

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if self._has_room(key):
            self._waiting.pop(key, None)
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
        else:
            self._waiting[key] = (value, timestamp)

    def _has_room(self, key: str) -> bool:
        if not self._has_file():
            return False
        if key in self._positions:
            return True
        capacity = self._capacity
        # As in _init_value: a length of 4 bytes, the key padded to 8 bytes, two doubles.
        length = len(key.encode())
        end = self._used + 4 + length + (8 - (length + 4) % 8) + 16
        while end > capacity:
            capacity *= 2
        return capacity == self._capacity or self._allocate(self._f.fileno(), capacity)

    def _has_file(self) -> bool:
        if self._f is not None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            with self._path.open("rb" if self._read_mode else "a+b") as file:
                size = os.fstat(file.fileno()).st_size
                if not self._read_mode and not self._allocate(file.fileno(), max(size, INITIAL_BYTES)):
                    if size == 0:
                        self._path.unlink()  # readers fail on an empty file
                    return False
            super().__init__(str(self._path), self._read_mode)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._postpone(error)
            return False
        return True

    def _allocate(self, descriptor: int, size: int) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            self._postpone(error)
            return False
        self._retry_at = 0.0
        return True

    def _postpone(self, error: OSError) -> None:
        if self._retry_at == 0.0:
            log.warning("some metrics of this process are not exported: %s: %s", self._path, error.strerror)
        self._retry_at = time.monotonic() + RETRY_SECONDS


def install_files() -> None:
    """Make prometheus_client use :class:`AllocatedDict`. No effect without ``posix_fallocate`` (macOS)."""
    if hasattr(os, "posix_fallocate"):
        values.MmapedDict = AllocatedDict  # type: ignore[attr-defined]
