"""The whole HTTP application in one process, without Ray: real CLIP, ledger, catalog and release protocol; a scripted
VLM.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from core.access import Access
from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from core.settings.serving import Serve
from ratchet_client.records import Sample
from serving.catalog.catalog import Catalog
from serving.catalog.tables import Tables
from serving.engines.clip import ClipEngine
from serving.engines.heads import Head
from serving.engines.vlm.generation import GenerationRequest
from serving.http.answer_receipts import AnswerReceipts
from serving.http.app import build_app
from serving.http.app_state import AppState
from serving.http.calibrations import Calibrations
from serving.http.image_loader import ImageLoader
from serving.http.store_services import DeletionService, FeedbackService
from serving.messages import EncodeResult, Modality
from serving.releases.admission import Admission
from serving.releases.guard import Observations
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import (
    HoldCommand,
    HoldingCommand,
    LiveCommand,
    Prepared,
    ReleaseCommand,
    ReleaseResult,
    ReleaseSnapshot,
    Residency,
    RollbackCommand,
)
from streams.ingest.resubmit import ResubmitReport
from streams.store.rows import Position
from streams.store.sample_queries import Receipt
from streams.store.sample_store import SampleStore
from tests.support.inputs import pictures
from tests.support.samples import sample
from tests.support.tiny import tiny_base
from tests.unit.serving.scripted_vlms import ScriptedVlms

KEY = "operator-key"
MAX_IMAGE_BYTES = 100_000


class AppClient:
    def __init__(self, runner: asyncio.Runner, app: FastAPI) -> None:
        self.runner = runner
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    def post(self, path: str, **body: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            return await self.http.post(path, **body)

        return self.runner.run(call())


@dataclass
class InProcessApp:
    """Implements what the routes need of encoders and operations, and the protocol's broadcast."""

    engine: ClipEngine
    ledger: Ledger
    catalog: Catalog
    artifacts: Artifacts
    has_vlm: bool = True
    admission: Admission = field(default_factory=Admission)
    samples: list[Sample] = field(default_factory=list)
    encoded: Counter[str] = field(default_factory=Counter)
    """Items that were encoded, by kind."""
    protocol: ReleaseProtocol = field(init=False)

    def __post_init__(self) -> None:
        self.protocol = ReleaseProtocol(self.ledger, self, window=2)  # type: ignore[arg-type]  # the calls of Broadcast

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        run = self.engine.encode_images if kind == "image" else self.engine.encode_tokens
        self.encoded[kind] += len(payload)
        spaces, scale = self.engine.spaces(snapshot.clip), self.engine.logit_scale
        vectors = run(payload, snapshot.clip)
        return EncodeResult(vectors, snapshot.clip, spaces.image, spaces.text, logit_scale=scale)

    async def heads(self, snapshot: ReleaseSnapshot, deadline: float) -> Mapping[str, Head]:
        return self.engine.heads(snapshot.clip)

    async def change(self, command: LiveCommand) -> ReleaseResult:
        """Change the release; half of the time, promoting a full release begins a canary, and fails."""
        match command:
            case ReleaseCommand():
                for name in command.adapters.values():
                    if name is not None:
                        self.ledger.adapter(name)
                return await self.protocol.release(command, forced=command.force)
            case RollbackCommand():
                return await self.protocol.rollback(command)
        live = self.ledger.live()
        assert live is not None
        if live.share >= 1:
            canary = ReleaseCommand(
                adapters={"clip": live.clip}, actor=command.actor, reason=command.reason,
                expected_live=command.expected_live, share=0.5,
            )  # fmt: skip
            await self.protocol.release(canary)
        return await self.protocol.promote(command)

    async def hold(self, command: HoldingCommand) -> None:
        write = self.ledger.hold if isinstance(command, HoldCommand) else self.ledger.resume
        write(command.actor, command.reason)

    async def status(self) -> dict[str, Any]:
        names = {"release": "release", "adapter": "adapter", "image_space": "image_space", "text_space": "text_space",
                 "vlm": "vlm_adapter", "share": "share"}  # fmt: skip
        resident = [{name: getattr(each, own) for name, own in names.items()} for each in self.admission.window]
        return {"started": True, "epoch": 1, "held": None, "resident": resident, "rollout": {"state": "idle"},
                "waits_for": [], "replicas": {}, "vlm": [], "in_flight": {}}  # fmt: skip

    async def prepare(self, clip: str | None) -> list[Prepared]:
        spaces = self.engine.spaces(clip)
        return [Prepared("one", clip, spaces.image, spaces.text)]

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        return [Prepared("one", vlm)]

    async def vlm_status(self) -> list[dict[str, Any]]:
        return [{"replica": "one"}]

    async def reconcile(self) -> None:
        while await self.catalog.reconciler.step():
            continue

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        await self.reconcile()
        return await self.catalog.cover(snapshot, wait=False)

    async def resident(self) -> list[ReleaseSnapshot]:
        return list(self.admission.window)

    async def announce(self, resident: Residency, seconds: float) -> int:
        self.admission.adopt(resident.window)
        await self.catalog.adopt(resident.indexed)
        await self.reconcile()
        return 1

    async def observations(self) -> list[Observations]:
        return []

    async def in_flight(self) -> dict[int, int]:
        return self.admission.in_flight()

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        await self.catalog.retire(keep)

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        return


async def open_in_process_app(home: Path, settings: Serve) -> tuple[InProcessApp, FastAPI]:
    """A served base with a few samples, and the application around it."""
    base = tiny_base(home)
    engine = ClipEngine(base, threads=1)
    store, samples = SampleStore(str(home / "lake")), _fill(str(home / "lake"))

    async def encode(pixels: Any, clip: str | None) -> Any:
        return engine.encode_images(pixels, clip)

    tables = Tables(str(home / "lake" / "catalog"), home / "catalog-index")
    catalog = Catalog(tables, store, base.preprocess.pixels, encode)
    ledger, artifacts = Ledger.open(f"sqlite:///{home / 'ledger.db'}"), Artifacts(str(home / "artifacts"))
    in_process = InProcessApp(engine, ledger, catalog, artifacts, samples=samples)
    await in_process.protocol.start()
    keyed = settings.model_copy(update={"operator_key": SecretStr(KEY)})
    access = Access(in_process.ledger, Settings(serve=keyed))

    async def status() -> dict[str, Any]:
        return catalog.status()

    stand_ins: dict[str, Any] = {
        "encoders": in_process, "operations": in_process, "quarantine": ScriptedQuarantine(), "vlms": FairVlms(),
        "receipts": ScriptedReceipts(),
        "index": SimpleNamespace(search=catalog.search, image=catalog.image, status=status),
    }  # fmt: skip
    app_state = AppState(
        settings=settings, dim=base.dim, tokenizer=engine.tokenizer, admission=in_process.admission, access=access,
        image_loader=ImageLoader(base.preprocess, settings), ledger=in_process.ledger, refresh=_nothing,
        deletions=DeletionService(Settings(home=home), in_process.ledger), answers=AnswerReceipts(SecretStr(KEY)),
        feedback=FeedbackService(in_process.ledger), **stand_ins,
        calibrations=Calibrations(artifacts.read_bytes, again=0.0),
    )  # fmt: skip
    return in_process, build_app(app_state)


class FairVlms(ScriptedVlms):
    """Gives equal probabilities to all choices."""

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        return [-0.5] * len(choices)


class ScriptedQuarantine:
    """One quarantined record, which may be resubmitted any number of times."""

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        record = {"place": "t:0:1", "reason": reason or "no_text", "detail": "", "source": "", "resubmission": None}
        return [{**record, "refused_at": datetime.now(UTC).isoformat()}][:limit]

    async def counts(self, reason: str | None, source: str | None) -> dict[str, dict[str, int]]:
        return {"reason": {"no_text": 1}, "source": {"": 1}}

    async def resubmit_many(self, which: Any, *, actor: str, reason: str, dry_run: bool) -> dict[str, Any]:
        return ResubmitReport(dry_run=dry_run, chosen=1, sent=1).as_json()

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        return {"topic": "t", "partition": 0, "offset": 2}


class ScriptedReceipts:
    """Every record was stored; sample IDs that begin with `f` are unknown."""

    async def of_position(self, topic: str, partition: int, offset: int) -> list[dict[str, Any]]:
        return [Receipt(topic, partition, offset, "stored").as_json()]

    async def of_sample(self, sample_id: str) -> list[dict[str, Any]]:
        return [] if sample_id.startswith("f") else [Receipt("t", 0, 1, "stored", id=sample_id).as_json()]


async def _nothing() -> None:
    await asyncio.sleep(0)


def _fill(lake: str) -> list[Sample]:
    samples = [
        Sample(image=image, text=f"picture {number}", domain="cats", source="test")
        for number, image in enumerate(pictures(6))
    ]
    rows = [
        sample(0, number, "t", id=each.id, image=each.image, text=each.text, domain=each.domain, source=each.source,
               time=datetime(2024, 1, 1 + number, tzinfo=UTC), ingested_at=datetime.now(UTC), tags=[])
        for number, each in enumerate(samples)
    ]  # fmt: skip
    SampleStore(lake).put(rows, [Position("t", 0, len(rows))])
    return samples
