"""An installation for one run: its parts as ``ratchet up`` starts and restarts them, and its faults."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.serving.session_processes import is_alive, kill, session_pids
from benchmarks.stream.ratchet_process import wait_for, write_settings
from core.addresses import free_port, listens
from core.ledger import Ledger
from core.progress import progress_log, step
from core.reaper import descendants
from core.settings import Settings
from core.settings.serving import BaseModels
from demo.data import DemoData, Preparation
from demo.first_start import clip_data, make_clip
from ops.cli.context import Context
from ops.cli.supervisor import Supervisor
from ratchet_client import Client
from streams.store.sample_store import SampleStore

ALL: Final = ("broker", "serve", "ingest", "maintain")
LOOK_SECONDS: Final = 0.2
INGRESS: Final = "ServeReplica:ratchet:Ingress"


@dataclass
class Installation:
    context: Context
    parts: Supervisor
    ledger: Ledger
    store: SampleStore
    client: Client

    @property
    def settings(self) -> Settings:
        return self.context.settings

    def keys(self, names: Sequence[str]) -> dict[str, str]:
        """New keys that may ask and report, by name."""
        scopes = ["infer", "search", "feedback"]
        return {name: self.ledger.create_key(name, scopes, actor="bench")[1] for name in names}

    def kill_part(self, name: str, process: str = "ops.cli.main", until: Callable[[], bool] = lambda: True) -> None:
        """SIGKILL a part's process whose command has this word. The supervisor restarts the part, though not before
        ``until`` holds.
        """
        part = self.parts.part(name)
        assert part.process is not None
        restarts, part.retry_at = part.restarts, math.inf
        pids = [pid for pid in descendants(part.process.pid) if process in _command(pid)]
        kill(pids[:1])
        wait_for(lambda: not part.running, f"{name} had ended")
        wait_for(until, f"what {name} was killed for")
        part.retry_at = time.monotonic()
        wait_for(lambda: part.restarts > restarts and part.running, f"{name} ran again")
        progress_log.info(f"{name} was killed, and runs again")

    def kill_ingress(self) -> None:
        """SIGKILL one of the processes that serve HTTP, and wait for another in its place."""
        before = session_pids(self.settings, INGRESS)
        kill(before[:1])
        wait_for(lambda: not any(map(is_alive, before[:1])), "the HTTP process had ended")
        wait_for(lambda: len(session_pids(self.settings, INGRESS)) >= len(before), "another HTTP process served", 180)
        progress_log.info("an HTTP process was killed, and another one serves")

    def lose_broker(self, published_stored: Callable[[], bool]) -> None:
        """Kill the broker, which forgets its log, while accepted corrections wait to be sent.

        Maintenance is killed first, and stays away until the broker is gone: what it has sent must be stored by then.
        """

        def broker_lost() -> bool:
            if not (published_stored() and self.ledger.corrections("accepted", 1)):
                return False
            self.kill_part("broker", "--storage-engine")
            return True

        self.kill_part("maintain", until=broker_lost)
        address = self.settings.kafka.bootstrap
        wait_for(lambda: listens(address), "the broker listened again")


def prepared(settings: Settings, domains: Sequence[str]) -> None:
    """The shipped base, its reference pool and suites, and these demo domains, in the home of the settings."""
    make_clip(settings)
    with step("preparing data"), Preparation([*clip_data(settings), *map(DemoData, domains)], settings.home) as data:
        data.wait_for_all()


@contextmanager
def running(
    settings: Settings, home: Path, parts: Sequence[str] = ALL, serve: dict[str, Any] | None = None, **sections: Any
) -> Iterator[Installation]:
    """Start the parts with a new home that has the base and the data of the settings. ``serve``: fields to change;
    ``sections``: other sections.
    """
    shutil.copytree(settings.home / "bases" / settings.base.clip, home / "bases" / settings.base.clip)
    (home / "data").symlink_to((settings.home / "data").resolve())
    own = {"port": free_port(), "encoder_threads": 1, **(serve or {})}
    changed = {
        "home": home, "ledger_url": None, "artifacts_url": None, "lake_url": None,
        "base": BaseModels(clip=settings.base.clip, vlm=""),
        "kafka": settings.kafka.model_copy(update={"bootstrap": f"127.0.0.1:{free_port()}", "batch_seconds": 0.5}),
        "serve": settings.serve.model_copy(update=own),
        "ingest": settings.ingest.model_copy(update={"metrics_port": 0}),
        "maintain": settings.maintain.model_copy(update={"metrics_port": 0, "seconds": 2.0}),
        **sections,
    }  # fmt: skip
    context = Context(write_settings(settings.model_copy(update=changed), home / "ratchet.yaml"), [])
    stop = threading.Event()
    with Supervisor(context, list(parts)) as supervisor:
        with step("starting the server"):
            supervisor.wait_until_ready("clip")
        watch = threading.Thread(target=_watch, args=(supervisor, stop))
        watch.start()
        ours = context.settings
        ledger = Ledger.open(ours.ledger)
        try:
            with Client(ours.serve.url, ours.operator_key().get_secret_value(), actor="bench") as client:
                yield Installation(context, supervisor, ledger, SampleStore(ours.lake), client)
        finally:
            stop.set()
            watch.join()
            ledger.close()


def _watch(supervisor: Supervisor, stop: threading.Event) -> None:
    while not stop.wait(LOOK_SECONDS):
        supervisor.restart_dead()


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""
