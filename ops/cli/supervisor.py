"""Starts the parts on one machine, restarts them when they die, and stops them in order."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from core.addresses import listens
from core.child_process import STOP_SECONDS, ChildProcess, processor_seconds, tail
from core.errors import RatchetError
from core.stop_signals import undisturbed
from ops.cli.context import Context
from ratchet_client.models import Family

if TYPE_CHECKING:
    from serving.start_progress import StartProgress


class Supervisor:
    """The parts of one Ratchet on one machine; a context manager that starts and stops them."""

    ORDER = ("broker", "serve", "ingest", "maintain", "trainer", "console")

    def __init__(self, context: Context, names: list[str]) -> None:
        settings = context.settings
        logs = settings.home / "logs"
        own_broker = "broker" in names and not listens(settings.kafka.bootstrap.split(",")[0])
        self.settings = settings
        self.parts = [
            ChildProcess(name, context.command(name), logs / f"{name}.log")
            for name in self.ORDER
            if name in names and (name != "broker" or own_broker)
        ]
        for topic in settings.kafka.bound if "ingest" in names else ():
            command = context.command("--set", "ingest.metrics_port=0", "ingest", "--topic", topic)
            self.parts.append(ChildProcess(f"ingest-{topic}", command, logs / f"ingest-{topic}.log"))

    def __enter__(self) -> Supervisor:
        with undisturbed():
            for part in self.parts:
                part.start()
        return self

    def __exit__(self, *_: object) -> None:
        with undisturbed():
            self.stop()

    def part(self, name: str) -> ChildProcess:
        return next(part for part in self.parts if part.name == name)

    def restart_dead(self) -> None:
        """Restart dead parts. Call about once a second."""
        now = time.monotonic()
        for part in self.parts:
            part.restart_dead(now)

    def wait_until_ready(self, model: Family = "vlm") -> StartProgress:
        """Wait until the server answers for a model (``vlm``: for all its models), reporting progress. Returns the
        progress, which continues while another model starts. Raises RatchetError when a part dies, with the end of its
        log, or when nothing moves any more."""
        from ratchet_client import Client
        from serving.app import serves_vlm
        from serving.start_progress import StartProgress

        models: tuple[Family, ...] = ("clip", "vlm") if serves_vlm(self.settings) else ("clip",)
        progress = StartProgress(Client(self.settings.serve.url), models)
        for wanted in models[: 1 + (model == "vlm")]:
            progress.wait_for(wanted, self.work, self.check)
        return progress

    def check(self) -> None:
        for part in self.parts:
            if not part.running:
                raise RatchetError(f"{part.name} ended:\n{tail(part.log)}", f"The whole log: {part.log}")

    def work(self) -> tuple[float, int]:
        """CPU seconds and log bytes of the parts, as a sign of activity."""
        running = [part for part in self.parts if part.process is not None]
        computed = sum(processor_seconds(part.process.pid) for part in running if part.process is not None)
        return computed, sum(part.log.stat().st_size for part in running)

    def stop(self) -> None:
        """Stop the parts, the broker last, with one deadline for all."""
        deadline = time.monotonic() + STOP_SECONDS
        for part in reversed(self.parts):
            if part.name != "broker":
                part.ask()
        for part in reversed(self.parts):
            part.stop(deadline)
