"""How Prometheus gets the metrics.

Serving runs in several processes, on several machines perhaps. With ``PROMETHEUS_MULTIPROC_DIR`` set before the first
import, the processes of one machine share a folder, and :func:`exposition` adds them up. Ingest and the updater are one
process each, and listen on a port of their own.

Every process imports all declarations, and one without labels exists with the value 0 from then on. A part therefore
shows only what is its own: serving must not say that the broker is down.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Part = Literal["ingest", "update", "serve"]
PARTS: dict[Part, tuple[str, ...]] = {
    "ingest": ("ratchet_ingest_", "ratchet_store_"),
    "update": ("ratchet_update", "ratchet_budget_", "ratchet_gate_"),
}
"""Beginnings of the names that one part alone exports; serving exports all others. Build information is everybody's."""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def exposition(part: Part) -> bytes:
    """The text that Prometheus scrapes of a part: of all processes that share the folder, if there is one."""
    return generate_latest(_registry(part))


def listen(part: Part, port: int, host: str = "127.0.0.1") -> None:
    """Serve this process's metrics; port 0 is off."""
    if port:
        start_http_server(port, addr=host, registry=_registry(part))


def shares_a_folder() -> bool:
    """Whether several processes of this machine write into one folder."""
    return FOLDER in os.environ and Path(os.environ[FOLDER]).is_dir()


def belongs(name: str, part: Part) -> bool:
    """Whether a part exports the metric of this name.

    Ray's own processes write into the same folder; their metrics are scraped from Ray. vLLM has no port of its own, so
    its metrics come with those of the replica that it runs in.
    """
    if name == "ratchet_build_info":
        return True
    if part in PARTS:
        return name.startswith(PARTS[part]) or not name.startswith("ratchet_")
    ours = name.startswith("ratchet_") and not any(name.startswith(beginnings) for beginnings in PARTS.values())
    return ours or name.startswith("vllm:")


class _Own(Collector):
    """What belongs to one part, of what another collector has."""

    def __init__(self, whole: Collector, part: Part) -> None:
        self.whole = whole
        self.part = part

    def collect(self) -> Iterable[Metric]:
        _forget_the_dead()
        return [metric for metric in self.whole.collect() if belongs(metric.name, self.part)]


def _registry(part: Part) -> CollectorRegistry:
    registry = CollectorRegistry()
    shared = multiprocess.MultiProcessCollector(None) if FOLDER in os.environ else REGISTRY  # type: ignore[no-untyped-call]
    registry.register(_Own(shared, part))
    return registry


def _forget_the_dead() -> None:
    """A process that was killed leaves its gauges behind: requests in flight that no one answers, an old release."""
    if not shares_a_folder():
        return
    for file in Path(os.environ[FOLDER]).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdigit() and not _runs(int(pid)):
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _runs(pid: int) -> bool:
    with contextlib.suppress(PermissionError):  # it runs, and is somebody else's
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
