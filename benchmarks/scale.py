"""``ratchet bench scale``: requests a second from one, two and three encoder nodes, with an engine that sleeps.

A Ray cluster on this machine: a head with ingress, catalog and controller, and nodes with one encoder each, which join
while the server runs. The engine sleeps instead of computing, so that nodes do not share its processors: the growth is
what the server can carry, and a request's cost besides the encoders is that of the control plane, with what that takes
without requests (``idle_cores``). ``scale_2`` and ``scale_3`` are requests a second over those of one node;
``planned_*`` is the prediction of the simulation of `ratchet bench plan` for the same load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.bench_home import bench_home, clip_base, without_vlm
from benchmarks.capacity import ServiceTimes
from benchmarks.closed_loop import closed_loop
from benchmarks.command import bench_parser, show_figures
from benchmarks.encode.figures import rounded
from benchmarks.encode.grid import Cell
from benchmarks.encode.sides import HttpSide, cpu_seconds, ratchet_side
from benchmarks.line_worker import LineWorker
from benchmarks.machine import machine
from core.addresses import free_port
from core.errors import ConfigError, RatchetError
from core.ledger import Ledger
from core.progress import progress_log, step
from core.settings import Settings
from core.waiting import wait_until
from ratchet_client import Client
from serving.app import application
from serving.engines.clip import ClipEngine
from serving.messages import IMAGE_COST, TEXT_COST
from serving.ray import ray_session, replica_process
from serving.ray.deployment_status import read_statuses
from serving.ray.ray_session import OBJECT_STORE_BYTES, deploy, start_ray
from serving.releases.broadcast import APP
from serving.replicas.encoder import Encoder

NODES, MOST_NODES = 3, 16
PASS_SECONDS: Final = 0.1
"""Of one forward pass, whatever it holds."""
TEXTS_A_PASS: Final = IMAGE_COST // TEXT_COST
"""Texts that fit into a batch of one image."""
CALLERS_A_NODE: Final = 16
"""Four passes: a queue is never empty, however a burst is spread."""
WARM_SECONDS: Final = 3.0
IDLE_SECONDS: Final = 5.0
START_SECONDS: Final = 120.0
A_NODE: Final = {"encoder": 1}
"""Ray's resources of a node."""
ON_A_NODE: Final = {"num_cpus": 0, "resources": A_NODE}


class SleepingEngine(ClipEngine):
    """Returns the same vectors after :data:`PASS_SECONDS`."""

    def _raw_images(self, resident: object, pixels: np.ndarray) -> np.ndarray:
        return self._slept(len(pixels))

    def _raw_texts(self, resident: object, rows: Sequence[Sequence[int]]) -> np.ndarray:
        return self._slept(len(rows))

    def _slept(self, count: int) -> np.ndarray:
        time.sleep(PASS_SECONDS)
        return np.ones((count, self.base.dim), np.float32)


class SleepingEncoder(Encoder):
    """One on each node."""

    def make_engine(self, settings: Settings) -> ClipEngine:
        return SleepingEngine.of(settings)


def run(settings: Settings, nodes: int = NODES, seconds: float = 10.0) -> dict[str, Any]:
    """Measure on a new home with the settings' CLIP. Returns the figures.

    Raises RatchetError when the server or a node does not start.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-bench-", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        ours = bench_home(
            without_vlm(settings), Path(folder) / "home", clip_base(settings, settings.base.clip), port=free_port(),
            host="127.0.0.1", operator_key=None, max_batch=1, encoder_threads=1, cache_bytes=0, caller_share=1.0,
        )  # fmt: skip
        Ledger.open(ours.ledger).close()
        side = ratchet_side(ours, stack.enter_context(LineWorker("benchmarks.encode.generator")))
        with step("starting Ray"):
            address = stack.enter_context(_head(ours))
        rows = []
        for count in range(1, nodes + 1):
            with step(f"{count} encoder nodes"):
                stack.enter_context(_node(address, Path(folder) / f"node-{count}.log"))
                serve = ours.serve.model_copy(update={"encoder_replicas": count})
                larger = application(
                    ours.model_copy(update={"serve": serve}), SleepingEncoder, ray_actor_options=ON_A_NODE
                )
                deploy(larger, APP, serve)
                _wait_for(ours, count)
            rows.append({"nodes": count, **_measure(side, count, seconds)})
            progress_log.info(f"{count} encoder nodes: {rows[-1]['requests_per_second']} requests/s")
    one = rows[0]["requests_per_second"]
    scales = {f"scale_{row['nodes']}": round(row["requests_per_second"] / one, 3) for row in rows[1:]}
    return {
        **scales, "control_ms_per_request": rows[-1]["control_ms_per_request"],
        "failed": sum(row["failed"] for row in rows), "pass_seconds": PASS_SECONDS, "texts_per_pass": TEXTS_A_PASS,
        "growth": rows, "machine": machine(),
    }  # fmt: skip


@contextmanager
def _head(settings: Settings) -> Iterator[str]:
    """A Ray session of this process, whose node has no encoders; its address."""
    settings.operator_key()
    folder = ray_session.session_directory(settings)
    held = ray_session.lock(folder)
    try:
        ray_session.prepare_environment(settings)
        start_ray(folder, settings.serve)
        import ray
        from ray import serve

        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        ray_session.end_leftovers(folder)
        os.close(held)


@contextmanager
def _node(address: str, log: Path) -> Iterator[None]:
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={address}",
        f"--node-ip-address={replica_process.NODE}", "--num-cpus=0", "--num-gpus=0",
        f"--resources={json.dumps(A_NODE)}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
    ]  # fmt: skip
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL) as node:
        try:
            yield
        finally:
            node.terminate()


def _wait_for(settings: Settings, nodes: int) -> None:
    """Return when this many encoders answer. Raises RatchetError."""

    def are_running() -> bool:
        status = read_statuses(APP).get("Encoder")
        return status is not None and status.running == nodes

    with Client(settings.serve.url) as client:
        if not wait_until(lambda: are_running() and client.is_ready(), START_SECONDS):
            raise RatchetError(f"{nodes} encoders did not start in {START_SECONDS:.0f} s.", "See Ray's log.")


def _measure(side: HttpSide, nodes: int, seconds: float) -> dict[str, Any]:
    cell = Cell("text", 1, CALLERS_A_NODE * nodes)
    side.measure(cell, WARM_SECONDS)
    idle = _idle_cores(side, IDLE_SECONDS)
    turn = side.measure(cell, seconds)
    times = ServiceTimes(first=PASS_SECONDS, each=0.0, request=0.0)
    planned = closed_loop(times, CALLERS_A_NODE * nodes, nodes, TEXTS_A_PASS)
    return {
        "requests_per_second": round(turn.rate, 1),
        "planned_requests_per_second": round(planned.requests_per_second, 1), "planned_p99": round(planned.p99, 4),
        "failed": turn.failed, "p50": round(turn.p50, 4),
        "p99": round(turn.p99, 4), "control_ms_per_request": rounded(turn.outside_ms, 2), "idle_cores": round(idle, 3),
    }  # fmt: skip


def _idle_cores(side: HttpSide, seconds: float) -> float:
    """Processor time of all processes but the encoders, each second without requests."""
    pids = side.outside()
    before = cpu_seconds(pids)
    time.sleep(seconds)
    return (cpu_seconds(pids) - before) / seconds


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("scale", __doc__)
    parser.add_argument("--nodes", type=int, default=NODES, help=f"encoder nodes at most ({NODES})")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a measurement (10)")
    options = parser.parse_args(arguments)
    if not 1 <= options.nodes <= MOST_NODES:
        raise ConfigError(f"--nodes {options.nodes} is out of bounds.", f"Ask for 1 to {MOST_NODES}.")
    show_figures("Encoder nodes, by an engine that sleeps", run(settings, options.nodes, options.seconds))
