"""The stores of a chaos run, each behind a relay, and the servers on them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from benchmarks.samples import fill_store
from benchmarks.serving.object_store import URL, ObjectStore
from benchmarks.serving.whole_server import WholeServer
from benchmarks.stream.small_disk import SmallDisk
from benchmarks.swap import make_adapters
from core.addresses import free_port
from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from core.settings.serving import BaseModels, Rollout
from serving.engines.vlm.vlm_base import load_vlm_base
from tests.support.commit_relay import CommitRelay
from tests.support.inputs import pictures, random_adapter
from tests.support.postgres import PostgresServer
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base

HOME_BYTES: Final = 256 << 20
IMAGES: Final = 6
CLIP_ADAPTERS: Final = 3
VLM_ADAPTERS: Final = 2
AWAY_SECONDS: Final = 180.0
REPLICAS: Final = ("encoder_replicas", "ingress_replicas", "vlm_replicas")


class ChaosInstallation:
    """PostgreSQL, an object store, a lake, and a home on a small disk; a second home when a second server starts."""

    def __init__(self, base: Settings, folder: Path, vlm_engine: str, new_adapters: int, stack: ExitStack) -> None:
        """Start the stores, and make models and samples.

        Args:
            base: source of the server's limits.
            vlm_engine: what runs a VLM; none is served when empty.
            new_adapters: number of CLIP adapters that are not released in turn; see :meth:`new_adapter`.
            stack: ends all of it.
        """
        self.folder = folder
        self._stack = stack
        self.postgres = PostgresServer()
        self.postgres.start()
        stack.callback(self.postgres.remove)
        self.commits = CommitRelay(self.postgres.port)
        stack.callback(self.commits.close)
        self.objects = stack.enter_context(ObjectStore(folder / "objects.log"))
        self.home_disk = stack.enter_context(SmallDisk(folder / "home-1", HOME_BYTES))
        clip = tiny_base(self.home_disk.folder).name
        vlm = tiny_vlm_base(self.home_disk.folder).name if vlm_engine else ""
        # Pairs, so that one that is killed is not missed.
        pairs = dict.fromkeys(REPLICAS, 2)
        bounds = {"port": free_port(), "vlm_max_rank": 8, "vlm_memory_gib": 0.25, "operator_key": None, **pairs}
        bounds["encoder_threads"] = 1
        bounds["cache_bytes"] = 0  # the load repeats a few inputs, which must reach the encoders
        engine = {"vlm_engine": vlm_engine} if vlm_engine else {}
        self.direct = Settings(
            home=self.home_disk.folder,
            ledger_url=self.postgres.url,
            artifacts_url=URL,
            lake_url=str(folder / "lake"),
            base=BaseModels(clip=clip, vlm=vlm),
            serve=base.serve.model_copy(update=bounds | engine),
            # The guard would roll random adapters back.
            rollout=Rollout(guard_seconds=0.0),
        )
        """The settings with which this process observes: stores without relays."""
        self.direct.operator_key()
        self.ledger = Ledger.open(self.direct.ledger)
        self.images = pictures(IMAGES)
        self.sample_ids = fill_store(self.direct, self.images)
        adapters = make_adapters(self.direct, CLIP_ADAPTERS + new_adapters)
        self.clips, self._new = adapters[:CLIP_ADAPTERS], adapters[CLIP_ADAPTERS:]
        self.vlms = make_vlm_adapters(self.direct, VLM_ADAPTERS) if vlm else []
        self._servers = 0

    def new_adapter(self) -> str:
        return self._new.pop()

    def server(self, environment: Mapping[str, str] | None = None) -> WholeServer:
        """A server that is not started yet. The second and later ones get their own home, and one replica of each
        deployment: two cores cannot run thirty processes for each of two servers.
        """
        self._servers += 1
        settings = self.direct
        if self._servers > 1:
            home = self.folder / f"home-{self._servers}"
            shutil.copytree(self.direct.home / "bases", home / "bases")
            shutil.copy2(self.direct.home / "operator.key", home / "operator.key")
            serve = settings.serve.model_copy(update={"port": free_port(), **dict.fromkeys(REPLICAS, 1)})
            settings = settings.model_copy(update={"home": home, "serve": serve})
        relayed = self.postgres.url.replace(f":{self.postgres.port}/", f":{self.commits.port}/")
        settings = settings.model_copy(update={"ledger_url": relayed})
        own = {**self.objects.environment(), **(environment or {})}
        server = WholeServer(settings, f"server-{self._servers}", self.folder, own)
        self._stack.callback(server.stop)
        return server

    def wait_for_ledger(self) -> float:
        """Wait until the ledger answers a query; returns the :func:`time.monotonic` of that."""
        url = self.postgres.url.replace("postgresql:", "postgresql+psycopg:")
        engine = create_engine(url, connect_args={"connect_timeout": 2, "client_encoding": "utf8"})
        end = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                with engine.connect() as connection:
                    connection.execute(text("select 1"))
                return time.monotonic()
            except OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
            finally:
                engine.dispose()


def make_vlm_adapters(settings: Settings, count: int) -> list[str]:
    base = load_vlm_base(settings.home, settings.base.vlm)
    ledger, artifacts, names = Ledger.open(settings.ledger), Artifacts(settings.artifacts), []
    for seed in range(count):
        folder = settings.home / "random" / f"vlm-{seed}"
        name = random_adapter(base, folder, seed)
        artifacts.put_directory(folder, f"adapters/{name}")
        ledger.register_adapter(
            name, family="vlm", base=base.digest, image_space="", text_space="", meta={"made_by": "ratchet bench"}
        )
        names.append(name)
    return names
