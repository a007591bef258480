"""A Ratchet server in processes of its own, on a tiny base, that tests may kill and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.expected import ExpectedVectors
from benchmarks.inputs import pictures
from benchmarks.load import Traffic
from ops.artifacts import Artifacts
from ops.ledger import Ledger
from ops.settings import Settings, load_settings
from serving.client import Client
from serving.deployments.session import session_directory
from serving.engines.base import ClipBase
from serving.engines.clip import ClipEngine
from streams.records import Sample
from streams.rows import Position
from streams.store import SampleStore
from tests.support.tiny import tiny_adapter, tiny_base

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ("a photo of a cat", "a red circle", "an old map", "two birds")
QUEUE = 48


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class House:
    """Settings, ledger and a server process of one home."""

    settings: Settings
    base: ClipBase
    config: Path
    process: subprocess.Popen[bytes] | None = None
    images: list[bytes] = field(default_factory=lambda: pictures(6))
    _seeds: int = 100

    @classmethod
    def make(cls, home: Path, **serve: Any) -> House:
        """A home with a tiny base; nothing runs yet."""
        home.mkdir(parents=True, exist_ok=True)
        base = tiny_base(home)
        config = home / "ratchet.yaml"
        bounds = {"port": free_port(), "queue": QUEUE, "deadline_seconds": 20, "max_body_bytes": 2 << 20,
                  "max_image_bytes": 1 << 20, "max_pixels": 1_000_000}  # fmt: skip
        config.write_text(yaml.safe_dump({"home": str(home), "base": {"clip": "tiny"}, "serve": bounds | serve}))
        return cls(load_settings(config, environ={}), base, config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.serve.port}"

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.settings.ledger)

    def client(self, actor: str = "test") -> Client:
        """An operator's client."""
        return Client(self.url, operator_key=self.settings.operator_key(), actor=actor)

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        log = (self.settings.home / "serve.log").open("ab")
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "serving.app", str(self.config)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 150
        with self.client() as client:
            while not client.is_ready():
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < end, self.log()
                time.sleep(0.2)

    def stop(self) -> None:
        """End it as an operator would."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.kill_everything()

    def log(self) -> str:
        """The end of the server's log."""
        return (self.settings.home / "serve.log").read_text()[-4000:]

    def pids(self, *names: str) -> list[int]:
        """Processes of this session whose command contains one of the names; all when none is given."""
        mark = str(session_directory(self.settings)).encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            ours = mark in command or (mark in environ and command.startswith(b"ray::"))
            if ours and (not names or any(name.encode() in command for name in names)):
                found.append(int(entry.name))
        return found

    def kill_everything(self) -> None:
        """SIGKILL the server and all of its processes at once."""
        assert self.process is not None
        for pid in [self.process.pid, *self.pids()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)

    def adapter(self, scale: float = 0.5, towers: tuple[str, ...] = ("image", "text")) -> str:
        """A new random adapter, stored and in the ledger."""
        self._seeds += 1
        folder = self.settings.home / "made" / str(self._seeds)
        name = tiny_adapter(self.base, folder, self._seeds, scale, towers)
        spaces = ClipEngine(self.base).load(name, folder)
        Artifacts(self.settings.artifacts).put_directory(folder, f"adapters/{name}")
        self.ledger.register_adapter(
            name, family="clip", base=self.base.digest, image_space=spaces.image, text_space=spaces.text, meta={}
        )
        return name

    def propose_update(self, name: str) -> None:
        """What the updater writes after a passed verdict."""
        ledger, update = self.ledger, f"update-{name}"
        ledger.begin_update(
            update, family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
        )
        ledger.propose("update", clip=name, vlm=None, actor="updater", reason="gate passed", update_id=update)

    def traffic(self, rate: float = 30.0) -> Traffic:
        """A checked load."""
        return Traffic(self.url, images=self.images, texts=TEXTS, settings=self.settings, rate=rate)

    def expected(self, adapter: str | None, images: Sequence[bytes] = (), texts: Sequence[str] = ()) -> Any:
        """Vectors that a server must answer under an adapter: images first, then texts."""
        made = ExpectedVectors(self.settings, images or self.images[:1], texts or TEXTS[:1])
        rows = made.of(adapter or "base")
        offset = max(1, len(images))
        return rows[: len(images)] if not texts else rows[offset:] if not images else rows

    def add_samples(self, count: int, domain: str = "cats", source: str = "test", year: int = 2024) -> list[str]:
        """Accepted samples, as ingest would have stored them. Returns their ids."""
        store = SampleStore(self.settings.lake)
        offset = store.offsets().get("t:0", 0)
        drawn = pictures(offset + count)[offset:]
        rows, ids = [], []
        for index, image in enumerate(drawn):
            sample = Sample(image=image, text=f"{domain} number {offset + index}", domain=domain, source=source)
            rows.append(
                {
                    "kind": "sample", "id": sample.id, "image": image, "text": sample.text, "domain": domain,
                    "source": source, "time": datetime(year, 1, 1 + index % 28, tzinfo=UTC),
                    "ingested_at": datetime.now(UTC), "split": "train", "tags": [], "topic": "t", "partition": 0,
                    "offset": offset + index, "question": "", "answer": "",
                }
            )  # fmt: skip
            ids.append(sample.id)
        store.commit(lambda _: (rows, [Position("t", 0, offset + count)]))
        return ids
