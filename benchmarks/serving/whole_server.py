"""``ratchet serve`` with its own home and metrics disk, as on a separate machine."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from benchmarks.serving.chaos_audit import Kill, Process
from benchmarks.serving.session_processes import engine_pids, is_alive, kill, session_pids
from benchmarks.stream.ratchet_process import RatchetProcess, wait_for, write_settings
from benchmarks.stream.small_disk import SmallDisk
from core.errors import RatchetError
from core.settings import Settings
from ratchet_client import Client
from serving.ray.ray_session import end_leftovers, session_directory

START_SECONDS: Final = 420.0
STOP_SECONDS: Final = 90.0
METRICS_BYTES: Final = 64 << 20
REPLICA: Final = "ServeReplica:ratchet:"
DEPLOYMENTS: Final[dict[Process, str]] = {
    "encoder": "Encoder",
    "vlm": "Vlm",
    "catalog": "Catalog",
    "ingress": "Ingress",
    "controller": "Controller",
}


class WholeServer:
    """One server process with its Ray session."""

    def __init__(self, settings: Settings, name: str, folder: Path, environment: Mapping[str, str]) -> None:
        """``folder``: for its log, ``NAME.log``. ``environment``: variables in addition to those of this process."""
        self.settings = settings
        self.name = name
        self._stack = ExitStack()
        # Its own artifact cache, as on another machine.
        own = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rc-", ignore_cleanup_errors=True))
        config = write_settings(settings, folder / f"{name}.json")
        self.part = RatchetProcess("serve", config, folder / f"{name}.log", {"TMPDIR": own, **environment})
        self.metrics_disk = SmallDisk(session_directory(settings) / "metrics", METRICS_BYTES)

    @property
    def url(self) -> str:
        return self.settings.serve.url

    def client(self, timeout: float) -> Client:
        return Client(
            self.url, self.settings.operator_key().get_secret_value(), actor="chaos", timeout=timeout, retries=0
        )

    def start(self) -> None:
        """Start it, and wait until it is ready. Raises RatchetError."""
        session = session_directory(self.settings)
        end_leftovers(session)
        shutil.rmtree(session, ignore_errors=True)  # of an earlier run in the same folder
        mounting = threading.Thread(target=self._mount, daemon=True)
        mounting.start()
        self.part.start()
        with self.client(20.0) as client:
            self.part.wait_for(client.is_ready, f"{self.name} was ready", START_SECONDS)

    def stop(self) -> bool:
        """Ask it to end; False when it had to be killed, or ended with an error."""
        clean = self.part.stop(STOP_SECONDS)
        if not clean:
            kill(session_pids(self.settings))
        self._stack.close()
        return clean

    def kill(self, process: Process, step: str = "") -> Kill:
        """SIGKILL one process of a kind: the first encoder, the engine of the VLM.

        Returns when it has ended: until then the kernel accepts requests for it.
        """
        began = time.time()
        name = f"{REPLICA}{DEPLOYMENTS[process]}"
        engines = engine_pids(self.settings) if process == "vlm" else []
        pids = engines or session_pids(self.settings, name)
        kill(pids[:1])
        wait_for(lambda: not any(map(is_alive, pids[:1])), "the killed process had ended")
        return Kill(process, step, began, time.time())

    def wait_until_whole(self, seconds: float) -> None:
        """Wait until every deployment has all its replicas, according to Serve, and the server is ready.

        Serve counts a killed replica for some more seconds, so its processes are counted, too. Raises RatchetError if
        not within this time.
        """
        serve = self.settings.serve
        counts = {"Encoder": serve.encoder_replicas, "Ingress": serve.ingress_replicas,
                  "Controller": min(2, serve.ingress_replicas), "Catalog": 1}  # fmt: skip
        engines = serve.vlm_replicas if self.settings.base.vlm else 0

        def whole() -> bool:
            if any(len(session_pids(self.settings, f"{REPLICA}{name}")) < count for name, count in counts.items()):
                return False
            with self.client(20.0) as client, suppress(RatchetError):  # no answer yet
                status = client.status()["controller"]
                working = sum(not replica["trouble"] for replica in status["vlm"])
                complete = all(
                    status["replicas"].get(name, {}).get("RUNNING", 0) >= count for name, count in counts.items()
                )
                return complete and working >= engines and client.is_ready()
            return False

        self.part.wait_for(whole, "every replica of the server was back", seconds)

    def _mount(self) -> None:
        """Mount the metrics disk when the server has made the folder, before processes write there."""
        wait_for(self.metrics_disk.folder.is_dir, "the metrics folder was made", START_SECONDS)
        self._stack.enter_context(self.metrics_disk)
