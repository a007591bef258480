"""A Ratchet server in its own processes, on a tiny base, that tests may kill and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx
import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.serving.session_processes import engine_pids, session_pids
from core.addresses import free_port
from core.artifacts import Artifacts
from core.child_process import processor_seconds
from core.ledger import Family, Ledger
from core.loading import load_settings
from core.settings import Settings
from core.waiting import StoodStill, wait_for_progress
from demo.load.answers import ExpectedVectors
from demo.load.traffic import Traffic
from ratchet_client import Client
from ratchet_client.records import Sample
from serving.engines.adapters import CONFIG, WEIGHTS, write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.heads import Head, read_heads
from serving.engines.vlm.vlm_base import VlmBase
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.inputs import pictures
from tests.support.tiny import tiny_adapter, tiny_base
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from updater.heads import fit_head, with_heads

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ("a photo of a cat", "a red circle", "an old map", "two birds")
QUESTIONS = ("what is this?", "is there a red car?")
BUSY_SECONDS = 500.0
"""Less than the timeout of a test, so that this fails first and says why."""


@dataclass
class ServerFixture:
    settings: Settings
    base: ClipBase
    config: Path
    process: subprocess.Popen[bytes] | None = None
    vlm: VlmBase | None = None
    images: list[bytes] = field(default_factory=lambda: pictures(6))
    _seeds: int = 100
    _started: ClassVar[ServerFixture | None] = None

    @classmethod
    def make(cls, home: Path, vlm_engine: str = "", **serve: Any) -> ServerFixture:
        """Make a home with a tiny base and start nothing. ``vlm_engine``: runs a tiny VLM; empty for no VLM."""
        home.mkdir(parents=True, exist_ok=True)
        base = tiny_base(home)
        vlm = tiny_vlm_base(home) if vlm_engine else None
        if vlm is not None:
            serve = {"vlm_engine": vlm_engine, "vlm_max_rank": 8, "vlm_memory_gib": 0.25} | serve
        bounds = {
            "port": free_port(), "deadline_seconds": 20, "max_image_bytes": 1 << 20,
            "max_pixels": 1_000_000, "encoder_replicas": 2, "encoder_threads": 1,
            "cache_bytes": 0,  # tests repeat their inputs, and mean the encoders
        }  # fmt: skip
        settings = {
            "home": str(home), "base": {"clip": base.name, "vlm": vlm.name if vlm is not None else ""},
            "serve": bounds | serve, "watch": {"seconds": 1.0, "drift_window": 10},
            # Tests share a server: a guard would take back their random adapters, and after a rollback of one, the
            # updates of the next one would wait.
            "rollout": {"hold_after_rollback": False, "guard_seconds": 0},
        }  # fmt: skip
        config = home / "ratchet.yaml"
        config.write_text(yaml.safe_dump(settings))
        return cls(load_settings(config, environ={}), base, config, vlm=vlm)

    @classmethod
    def make_with_movable_ledger(cls, home: Path, **serve: Any) -> ServerFixture:
        """Like :meth:`make`, with a ledger that :meth:`move_ledger` takes away."""
        server = cls.make(home, **serve)
        (home / "up").mkdir()
        (home / "down" / "ledger.db").mkdir(parents=True)  # cannot be opened, as a database that is down
        server.configure(ledger_url=f"sqlite:///{home}/ledger/ledger.db")
        server.move_ledger("up")
        return server

    def configure(self, **settings: Any) -> None:
        """Change settings; of a section, those that are named."""
        known = yaml.safe_load(self.config.read_text())
        for name, value in settings.items():
            known[name] = {**known.get(name, {}), **value} if isinstance(value, dict) else value
        self.config.write_text(yaml.safe_dump(known))
        self.settings = load_settings(self.config, environ={})

    def move_ledger(self, to: Literal["up", "down"]) -> None:
        """Atomically change the link through which all processes reach the ledger."""
        link = self.settings.home / "ledger.new"
        link.symlink_to(self.settings.home / to)
        link.replace(self.settings.home / "ledger")

    @property
    def url(self) -> str:
        return self.settings.serve.url

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.settings.ledger)

    def client(self, actor: str = "test") -> Client:
        return Client(self.url, self.settings.operator_key().get_secret_value(), actor=actor, retries=0)

    def ensure_running(self) -> None:
        """Start the server unless it runs, and wait until CLIP answers and, where one is served, the VLM."""
        if self.process is None or self.process.poll() is not None:
            self.start()
            self.until(self.client().is_ready)

    def start(self) -> None:
        """Start the server and wait until CLIP answers.

        Stops a server that another fixture left running: even an idle server takes processor time that tests need.
        """
        if ServerFixture._started is not None:
            ServerFixture._started.stop()
        ServerFixture._started = self
        path = self.settings.home / "serve.log"
        log = path.open("ab")
        before = log.tell()
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "serving.app", str(self.config)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT, start_new_session=True)
        process = self.process
        self.until(lambda: process.poll() is not None or b"ratchet serves on" in path.read_bytes()[before:])
        assert process.poll() is None, self.log()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.kill_everything()

    def log(self) -> str:
        return (self.settings.home / "serve.log").read_text()[-4000:]

    def records(self) -> list[dict[str, Any]]:
        lines = (self.settings.home / "serve.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition while the server makes progress; shows its log when it stops."""
        written = lambda: f"{(self.settings.home / 'serve.log').stat().st_size} bytes of log"  # noqa: E731
        work = lambda: processor_seconds(self.process.pid) if self.process is not None else 0  # noqa: E731
        try:
            wait_for_progress(condition, written, work=work, busy_seconds=BUSY_SECONDS)
        except StoodStill as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def metric(self, series: str) -> float:
        page = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=20).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(series))

    def requests_in_flight(self) -> float:
        return self.metric("ratchet_release_in_flight_requests{")

    def pids(self, *names: str) -> list[int]:
        return session_pids(self.settings, *names)

    def engines(self) -> list[int]:
        """Processes in which vLLM answers for this session, whatever their title."""
        return engine_pids(self.settings)

    @contextmanager
    def stopped_encoders(self) -> Iterator[list[int]]:
        """Send SIGSTOP to all encoders, including those that are starting, yield their processes, and send SIGCONT at
        the end.
        """
        pids = self.pids("ServeReplica:ratchet:Encoder")
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def kill_everything(self, but: Collection[int] = ()) -> None:
        """SIGKILL the server and all of its processes at once, except some."""
        assert self.process is not None
        for pid in {self.process.pid, *self.pids()}.difference(but):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(60)

    def adapter(
        self,
        scale: float = 0.5,
        towers: tuple[str, ...] = ("image", "text"),
        passed: bool = True,
        labelled: Sequence[tuple[bytes, str]] = (),
    ) -> str:
        """Store a new random adapter in the ledger, with a passed verdict if wanted. With labelled images it has the
        head ``animals``.
        """
        folder = self._new_folder()
        name = tiny_adapter(self.base, folder, self._seeds, scale, towers)
        engine = ClipEngine(self.base)
        spaces = engine.load(name, folder)
        if labelled:
            pixels = np.stack([self.base.preprocess.pixels(image) for image, _ in labelled])
            head = fit_head(engine.encode_images(pixels, name), [label for _, label in labelled])
            folder = with_heads(engine, folder, {"animals": head}, folder.with_name(f"{self._seeds}-with-heads"))
            name = folder.name
        return self.keep(name, folder, "clip", (spaces.image, spaces.text), passed)

    def vlm_adapter(self) -> str:
        assert self.vlm is not None
        folder = self._new_folder()
        return self.keep(tiny_vlm_adapter(self.vlm, folder, self._seeds, 1.0, ("text", "image")), folder, "vlm")

    def nan_adapter(self, family: Family) -> str:
        """An adapter whose first weights are no numbers, with a passed verdict."""
        base: ClipBase | VlmBase | None = self.base if family == "clip" else self.vlm
        assert base is not None
        made = self.adapter() if family == "clip" else self.vlm_adapter()
        good = Artifacts(self.settings.artifacts).fetch(f"adapters/{made}")
        tensors = load_file(good / WEIGHTS)
        first = min(tensors)
        tensors[first] = torch.full_like(tensors[first], float("nan"))
        folder = self._new_folder()
        return self.keep(write_adapter(folder, tensors, json.loads((good / CONFIG).read_text()), base), folder, family)

    def keep(
        self, name: str, folder: Path, family: Family, spaces: tuple[str, str] | None = None, passed: bool = True
    ) -> str:
        Artifacts(self.settings.artifacts).put_directory(folder, f"adapters/{name}")
        base = self.base if family == "clip" else self.vlm
        image, text = spaces or ("", "")
        assert base is not None
        self.ledger.register_adapter(name, family=family, base=base.digest, image_space=image, text_space=text, meta={})
        if passed:
            self._update(f"judged-{name}", family)
            self.ledger.advance_update(f"judged-{name}", "done", adapter=name)
            self.ledger.record_verdict(f"judged-{name}", name, "passed", "reports/none", {})
        return name

    def _new_folder(self) -> Path:
        self._seeds += 1
        return self.settings.home / "made" / str(self._seeds)

    def _update(self, update: str, family: Family) -> None:
        self.ledger.begin_update(
            update, family=family, recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
        )

    def head_of(self, name: str) -> Head:
        return read_heads(Artifacts(self.settings.artifacts).fetch(f"adapters/{name}"))["animals"]

    def propose_update(self, name: str, family: Family = "clip") -> None:
        self._update(f"update-{name}", family)
        adapters: dict[str, Any] = {"clip": None, "vlm": None, family: name}
        self.ledger.propose(
            "update", family=family, **adapters, actor="updater", reason="gate passed", update_id=f"update-{name}"
        )

    def traffic(self, rate: float = 30.0, concurrency: int = 0, questions: bool = False) -> Traffic:
        """Send a checked load. ``questions``: every third request asks the VLM. ``concurrency``: number of callers that
        wait for their answers, instead of a rate.
        """
        asked = [(image, text) for image in self.images for text in QUESTIONS] if questions else []
        return Traffic(self.url, images=self.images, texts=TEXTS, questions=asked, settings=self.settings, rate=rate,
                       concurrency=concurrency)  # fmt: skip

    def expected(self, adapter: str | None, images: Sequence[bytes] = (), texts: Sequence[str] = ()) -> Any:
        """Vectors that a server must return under an adapter: images first, then texts."""
        rows = ExpectedVectors(self.settings, images or self.images[:1], texts or TEXTS[:1]).of(adapter or "base")
        first = 0 if images else 1
        return rows[first : first + len(images) + len(texts)]

    def until_covered(self) -> None:
        """Wait until the catalog has the samples of the shared server in every space."""
        with self.client() as client:

            def covered() -> bool:
                catalog = client.status()["catalog"]
                return bool(catalog["corpus_rows"] >= 40 and catalog["coverage"] >= 1.0)

            self.until(covered)

    def add_samples(self, count: int, domain: str = "cats", source: str = "test", year: int = 2024) -> list[str]:
        """Add accepted samples as ingest would have stored them, and return their IDs."""
        store = SampleStore(self.settings.lake)
        offset = store.offsets().get("t:0", 0)
        rows = []
        for index, image in enumerate(pictures(offset + count)[offset:]):
            sample = Sample(image=image, text=f"{domain} number {offset + index}", domain=domain, source=source)
            rows.append(
                {
                    "kind": "sample", "id": sample.id, "image": image, "text": sample.text, "domain": domain,
                    "source": source, "time": datetime(year, 1, 1 + index % 28, tzinfo=UTC),
                    "ingested_at": datetime.now(UTC), "split": "train", "tags": [], "topic": "t", "partition": 0,
                    "look": None, "words": 0, "offset": offset + index, "question": "", "answer": "",
                }
            )  # fmt: skip
        store.put(rows, [Position("t", 0, offset + count)])
        return [row["id"] for row in rows]
