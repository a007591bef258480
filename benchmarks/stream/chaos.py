"""``ratchet bench chaos --part stream``: is every record accounted for, even if processes die meanwhile?

Records are produced at a steady rate, 5% of them bad. Two workers and a maintenance process are killed, or stopped for
up to 20 seconds, and started again; the broker goes away and comes back; the disk of the home and the store is full for
a while. In the end everything runs, all is drained, and each record, sample and quarantined record is looked for.

The embedded broker keeps its log in memory only, so it is not restarted: a relay in front of it is cut and opened
again, which looks to its clients like the restart of a broker that keeps its log. The producer waits meanwhile.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from benchmarks.stream.chaos_audit import OffsetWatch, audit, quarantined
from benchmarks.stream.chaos_plan import Fault, plan
from benchmarks.stream.chaos_records import SteadyProducer
from benchmarks.stream.installation import Installation
from benchmarks.stream.ratchet_process import RatchetProcess
from benchmarks.stream.small_disk import SmallDisk
from core.addresses import free_port
from core.progress import progress_log, step
from core.settings import Settings
from core.settings.streams import Maintain
from core.waiting import wait_until
from streams.kafka.broker import EmbeddedBroker
from streams.store.sample_store import SampleStore
from tests.support.tcp_relay import TcpRelay

WORKERS = 2
PRODUCE_SHARE = 0.9
"""Share of the time; faults go on until its end."""
DRAIN_SECONDS = 240.0
PRESSURE: dict[str, Any] = {
    "kafka": {"partitions": 4, "batch_seconds": 0.5},
    "maintain": Maintain(seconds=2.0, keep_seconds=60.0),
}
"""Small commits and frequent maintenance: more moments at which a process can be between two steps. Old versions are
kept for longer than a process is stopped; by default it is an hour."""
CUT_OFF = "The broker was cut off by a relay and not restarted: the embedded one forgets its log when it ends."
VIOLATIONS = (
    "lost",
    "double",
    "quarantine_double",
    "offsets_backwards",
    "misjudged",
    "tally_wrong",
    "ended_by_themselves",
)


class ChaosRun:
    """One run, with its processes and current faults."""

    def __init__(
        self, installation: Installation, producer: SteadyProducer, proxy: TcpRelay, disk: SmallDisk, logs: Path
    ) -> None:
        self.installation = installation
        self.proxy = proxy
        self.disk = disk
        workers = {f"worker {number}": installation.config_of(number) for number in range(WORKERS)}
        self.parts = {
            name: RatchetProcess("ingest", config, logs / f"{name.replace(' ', '-')}.log")
            for name, config in workers.items()
        }
        self.parts["maintain"] = RatchetProcess("maintain", installation.config, logs / "maintain.log")
        self.producer = producer
        self.counts = {"kill": 0, "stop": 0, "cut": 0, "full": 0}
        self.full_seconds = 0.0
        self.unexpected = 0

    @property
    def targets(self) -> list[str]:
        return [*self.parts, "broker", *(["disk"] if self.disk.mounted else [])]

    def play(self, faults: Sequence[Fault]) -> None:
        began = time.monotonic()
        actions = [(fault.at, self._break, fault) for fault in faults]
        actions += [(fault.at + fault.seconds, self._repair, fault) for fault in faults]
        for due, act, fault in sorted(actions, key=lambda action: action[0]):
            while (wait := began + due - time.monotonic()) > 0:
                time.sleep(min(wait, 0.5))
                self._revive()
            act(fault)

    def _break(self, fault: Fault) -> None:
        progress_log.warning(fault)
        self.counts[fault.kind] += 1
        if fault.kind == "cut":
            self.producer.pause()
            self.proxy.cut()
        elif fault.kind == "full":
            self.disk.fill()
        elif fault.kind == "kill":
            self.parts[fault.target].kill()
            self.parts[fault.target].process = None
        else:
            self.parts[fault.target].signal(signal.SIGSTOP)

    def _repair(self, fault: Fault) -> None:
        if fault.kind == "cut":
            self.proxy.open()
            self.producer.resume()
        elif fault.kind == "full":
            self.disk.free()
            self.full_seconds += fault.seconds
        elif fault.kind == "kill":
            self.parts[fault.target].start()
        else:
            self.parts[fault.target].signal(signal.SIGCONT)

    def _revive(self) -> None:
        for name, part in self.parts.items():
            if part.process is not None and not part.running:
                self.unexpected += 1
                progress_log.error(f"{name} ended by itself with {part.process.returncode}; see {part.log}")
                part.start()

    def drain(self) -> bool:
        """Wait until all records are stored, quarantined ones are published, and every process has started (one that is
        starting ends by SIGTERM itself, not well); False on timeout."""
        last: dict[int, int] = {}
        for partition, offset in self.producer.places:
            last[partition] = max(last.get(partition, 0), offset + 1)

        def is_drained() -> bool:
            self._revive()
            positions = self.installation.store.positions().values()
            done = {each.partition for each in positions if each.published >= last.get(each.partition, 0)}
            return done >= last.keys() and all(part.metrics() for part in self.parts.values())

        return wait_until(is_drained, DRAIN_SECONDS, pause=0.5)


def run(
    settings: Settings, seconds: float, records: int, seed: int, folder: Path, homes: str = "one"
) -> dict[str, Any]:
    """Run on a new home in ``folder``, where the logs stay. Returns the figures. Raises RatchetError if the records
    could not be produced.
    """
    began = time.time()
    with ExitStack() as stack:
        disk = stack.enter_context(SmallDisk(folder / "home"))
        if not disk.mounted:
            progress_log.warning("no small disk can be mounted here (that takes root): the disk does not get full")
        port = free_port()
        broker = stack.enter_context(EmbeddedBroker(advertised=f"127.0.0.1:{port}"))
        proxy = TcpRelay(port, broker.address)
        proxy.open()
        stack.callback(proxy.cut)
        installation = Installation(settings, disk.folder, f"127.0.0.1:{port}", **PRESSURE)
        installation.apart = homes == "two"
        producer = SteadyProducer(installation.kafka, records, seconds * PRODUCE_SHARE, seed)
        running = ChaosRun(installation, producer, proxy, disk, folder)
        return _play(running, seconds, seed) | {"seconds": round(time.time() - began, 1)}


def _play(running: ChaosRun, seconds: float, seed: int) -> dict[str, Any]:
    installation, producer = running.installation, running.producer
    faults = plan(seconds, seed, running.targets)
    watch = OffsetWatch(SampleStore(installation.settings.lake))
    for part in running.parts.values():
        part.start()
    try:
        producer.start()
        watch.start()
        running.play(faults)
        producer.finish()
        with step("draining"):
            drained = running.drain()
    finally:
        ended_well = [part.stop() for part in running.parts.values()]
        watch.end()
    with step("looking for every record"):
        result = audit(installation.kafka.topic, producer.places, installation.store, quarantined(installation.kafka))
    for line in [*result.evidence, *watch.evidence]:
        progress_log.error(line)
    return {
        "produced": len(producer.places),
        "bad": sum(record.kind == "bad" for record in producer.places.values()),
        "lost": result.lost,
        "double": result.double,
        "quarantine_double": result.quarantine_double,
        "offsets_backwards": watch.backwards,
        "misjudged": result.misjudged,
        "tally_wrong": result.tally_wrong,
        "crashed": result.crashed,
        "drained": drained,
        "kills": running.counts["kill"],
        "stops": running.counts["stop"],
        "broker_cuts": running.counts["cut"],
        "disk_full_seconds": round(running.full_seconds, 1),
        "ended_by_themselves": running.unexpected + ended_well.count(False),
        "homes": 2 if installation.apart else 1,
        "seed": seed,
        "machine": machine(),
    }


def show(figures: dict[str, Any]) -> None:
    show_figures("The stream under chaos", figures, CUT_OFF)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Status 1 when a record was lost or doubled, or an offset fell."""
    parser = bench_parser("chaos --part stream", __doc__)
    parser.add_argument("--seconds", type=float, default=600, help="time in which things break (600)")
    parser.add_argument("--records", type=int, default=50_000, help="records to produce (50000)")
    parser.add_argument("--seed", type=int, default=0, help="of the records and of what breaks when (0)")
    parser.add_argument(
        "--homes", choices=["one", "two"], default="one", help="workers on one machine, or on two (one)"
    )
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs of the processes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ratchet-chaos-") as temporary:
        folder = options.logs or Path(temporary)
        figures = run(settings, options.seconds, options.records, options.seed, folder, options.homes)
    show(figures)
    if not figures["drained"] or any(figures[name] for name in VIOLATIONS):
        raise SystemExit(1)
