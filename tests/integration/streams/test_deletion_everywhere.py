"""A deletion followed through every place that had the sample, until its bytes are gone from the disk."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.ledger import DeletionRow, Ledger
from core.settings import Settings
from ratchet_client.encoding import encode
from ratchet_client.records import Sample
from serving.catalog.catalog import Catalog
from serving.catalog.queries import Filters
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.ingest.consumer import Consumer
from streams.store import maintenance
from streams.store.deletion import request_deletion
from streams.store.maintenance import Maintainer
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, picture, reading, records_seen, wait_for
from updater.data.pools import draw_pools
from updater.recipes import load_recipe

HERE, THERE = ReleaseSnapshot(1, None, "aaaa", "t"), ReleaseSnapshot(2, "clip-x", "bbbb", "t")
GONE, KEPT = "withdrawn source", "lasting source"
DIM = 8


def marked(seed: int, mark: str) -> bytes:
    info = PngInfo()
    info.add_text("comment", f"IMAGE-{mark}-{hashlib.sha256(mark.encode()).hexdigest()}")
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def needles(mark: str) -> dict[str, bytes]:
    digest = hashlib.sha256(mark.encode()).hexdigest()
    return {"image": f"IMAGE-{mark}-{digest}".encode(), "caption": f"caption of {mark} {digest}".encode()}


def caption(mark: str) -> str:
    return needles(mark)["caption"].decode()


def files_with(home: Path, needle: bytes) -> list[str]:
    lake = home / "lake"
    return [str(path.relative_to(lake)) for path in lake.rglob("*") if path.is_file() and needle in path.read_bytes()]


class Publisher:
    def __init__(self, settings: Settings) -> None:
        self.kafka = settings.kafka
        self.sent = 0

    def send(self, value: bytes | None, key: bytes, headers: list[tuple[str, bytes]], partition: int) -> None:
        producer = KafkaProducer(bootstrap_servers=self.kafka.bootstrap)
        producer.send(self.kafka.topic, value, key=key, headers=headers, partition=partition).get(30)
        producer.close(5)
        self.sent += 1

    def sample(self, mark: str, source: str, seed: int, partition: int = 0) -> None:
        message = encode(Sample(image=marked(seed, mark), text=caption(mark), source=source, domain="streets"), "raw")
        self.send(message.value, mark.encode(), list(message.headers), partition)

    def refused(self, mark: str, source: str) -> None:
        headers = [("ratchet_source", source.encode()), ("ratchet_text", caption(mark).encode())]
        self.send(needles(mark)["image"] + b" is no picture", mark.encode(), headers, 0)

    def tombstone(self, mark: str, partition: int = 0) -> None:
        self.send(None, mark.encode(), [], partition)


@dataclass
class Installation:
    """A broker, an ingest, the store, a catalog and the ledger."""

    settings: Settings
    publisher: Publisher
    store: SampleStore
    ledger: Ledger
    catalog: Catalog
    ingest: Consumer

    def ingested(self) -> None:
        wait_for(lambda: records_seen(self.ingest.status) == self.publisher.sent, f"{self.publisher.sent} records")

    def follow(self) -> None:
        async def settle() -> None:
            while await self.catalog.reconciler.step():
                pass

        asyncio.run(settle())

    def maintain(self, runs: int = 1) -> None:
        maintainer = Maintainer(self.settings, self.ledger)
        for _ in range(runs):
            maintainer.run_once()
        maintainer.close()

    def learn(self, name: str, start: dict[str, int]) -> None:
        """Record an update that learned everything from ``start`` on."""
        self.ledger.begin_update(
            f"update-{name}", family="clip", recipe={}, seed=0, store_version=self.store.version(), data_from=start,
            data_to=self.store.offsets(), incumbent=None,
        )  # fmt: skip
        self.ledger.advance_update(f"update-{name}", "trained", adapter=name)
        self.ledger.advance_update(f"update-{name}", "done")

    def learnable(self) -> set[str]:
        half = {key: offset // 2 for key, offset in self.store.offsets().items()}
        pools = draw_pools(self.store, load_recipe("default"), (), self.store.version(), half, seed=1)
        return {example.text for example in (*pools.new, *pools.replay)}

    def searchable(self, space: str) -> set[str]:
        async def search() -> set[str]:
            hits = await self.catalog.search(space, np.ones(DIM, np.float32), 100, Filters())
            return {hit.text for hit in hits}

        return asyncio.run(search())


async def vectors(batch: Any, clip: str | None) -> Any:
    return np.stack([np.resize(image.astype(np.float32).ravel() + 1, DIM) for image in batch])


@pytest.fixture
def here(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    settings = broker.settings(tmp_path, maintain={"keep_seconds": 0}, ingest={"fresh_eval_share": 0.0})
    make_topics(settings)
    store, ledger = SampleStore(settings.lake), Ledger.open(settings.ledger)
    catalog = Catalog(
        Tables(str(tmp_path / "lake" / "catalog"), tmp_path / "index"),
        store,
        lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((2, 2)), np.uint8),
        vectors,
    )
    asyncio.run(catalog.adopt([THERE, HERE]))
    with reading(settings) as ingest:
        yield Installation(settings, Publisher(settings), store, ledger, catalog, ingest)
    ledger.close()


def fill(at: Installation) -> None:
    for seed, (mark, source, partition) in enumerate(
        [("gone-1", GONE, 0), ("kept-1", KEPT, 0), ("gone-2", GONE, 1), ("kept-2", KEPT, 1), ("by-key", KEPT, 1)]
    ):
        at.publisher.sample(mark, source, 900 + seed, partition)
    at.publisher.refused("refused-gone", GONE)
    at.publisher.refused("refused-kept", KEPT)
    at.ingested()
    at.follow()
    at.learn("clip-learned", {})
    learned = at.store.offsets()
    at.publisher.sample("kept-3", KEPT, 950)
    at.ingested()
    at.learn("clip-later", learned)
    at.follow()


def check_it_is_everywhere(at: Installation, *marks: str) -> None:
    """Make sure that the test looks in the right places."""
    for mark in marks:
        held = {kind: files_with(at.settings.home, needle) for kind, needle in needles(mark).items()}
        assert any("samples.lance" in file for file in held["image"]), mark
        assert any("samples.lance" in file for file in held["caption"]), mark
        tables = {file.split("/")[1] for file in held["caption"] if file.startswith("catalog/")}
        assert tables == {"clip_aaaa.lance", "clip_bbbb.lance"}, mark
        assert caption(mark) in at.learnable() & at.searchable("aaaa") & at.searchable("bbbb"), mark


def check_it_is_nowhere(at: Installation, *marks: str) -> None:
    for mark in marks:
        for kind, needle in needles(mark).items():
            assert files_with(at.settings.home, needle) == [], (mark, kind)
        assert caption(mark) not in at.learnable() | at.searchable("aaaa") | at.searchable("bbbb"), mark
        assert at.store.select(f"text = '{caption(mark)}'", ["id"]) == []


def row_of(at: Installation, name: str) -> DeletionRow:
    row = at.ledger.deletion(name)
    assert row is not None
    return row


def test_a_source_leaves_every_place_and_the_receipt_names_what_learned_from_it(here: Installation) -> None:
    fill(here)
    check_it_is_everywhere(here, "gone-1", "gone-2", "kept-1")
    assert len(here.store.quarantined(10, source=GONE)) == 1
    assert files_with(here.settings.home, needles("refused-gone")["image"]) != []
    ids = here.store.select(f"source = '{GONE}' AND kind = 'sample'", ["id"])
    name = request_deletion(here.ledger, {"source": GONE}, actor="ann", reason="consent withdrawn").id

    here.maintain()
    here.follow()
    check_it_is_nowhere(here, "gone-1", "gone-2")
    assert files_with(here.settings.home, needles("refused-gone")["image"]) == []
    assert here.store.quarantined(10, source=GONE) == []

    row = row_of(here, name)
    assert (row.state, row.samples, row.refusals) == ("done", 2, 1)
    assert row.adapters == {"learned": ["clip-learned"], "may_have_replayed": ["clip-later"]}
    assert row.removed_at is not None and row.done_at is not None
    audit = {each.action: each for each in here.ledger.audit_rows(subject=f"deletion {name}")}
    assert (audit["delete"].actor, audit["deleted"].detail["samples"]) == ("ann", 2)
    [event] = [each for each in here.ledger.waiting_events() if each.type == "ratchet.deletion.v1"]
    assert event.data["adapters"]["learned"] == ["clip-learned"] and event.subject == f"deletion {name}"
    here.ledger.begin_update(
        "update-next", family="clip", recipe={}, seed=0, store_version=here.store.version(), data_from={}, data_to={},
        incumbent=None,
    )  # fmt: skip
    listed = here.ledger.list_deletions_in("update-next", here.store.version())
    assert [each.id for each in listed] == [name] and row_of(here, name).update_id == "update-next"
    for each in ids:
        receipts = here.store.select(f"id = '{each['id']}'", ["kind", "reason", "detail"])
        assert receipts == [{"kind": "deleted", "reason": "deletion", "detail": name}]

    kept = {caption(mark) for mark in ("kept-1", "kept-2", "kept-3", "by-key")}
    assert here.learnable() == here.searchable("aaaa") == here.searchable("bbbb") == kept
    assert len(here.store.quarantined(10, source=KEPT)) == 1
    assert here.store.image([row["id"] for row in here.store.scan(columns=["id"]).to_pylist()]).keys() == {
        row["id"] for row in here.store.scan(columns=["id"]).to_pylist()
    }


def test_a_tombstone_deletes_by_key_and_what_is_sent_after_it_is_a_sample_again(here: Installation) -> None:
    fill(here)
    check_it_is_everywhere(here, "by-key")
    here.publisher.tombstone("by-key", partition=1)
    here.ingested()
    here.maintain()
    here.follow()
    check_it_is_nowhere(here, "by-key")
    [row] = here.ledger.deletions()
    assert (row.state, row.samples, row.actor) == ("done", 1, "producer")
    assert row.id.startswith("tombstone ") and row.adapters["learned"] == ["clip-learned"]

    here.publisher.sample("by-key", KEPT, 904, partition=1)
    here.ingested()
    here.maintain()
    here.follow()
    check_it_is_everywhere(here, "by-key")
    assert len(here.ledger.deletions()) == 1


def test_bytes_stay_only_while_an_update_is_pinned_to_them(here: Installation) -> None:
    fill(here)
    pinned = here.store.version()
    here.ledger.begin_update(
        "update-running", family="clip", recipe={}, seed=0, store_version=pinned, data_from={}, data_to={},
        incumbent=None,
    )  # fmt: skip
    here.store.pin("update-running", pinned)
    prepared = here.settings.update_folders / "update-running" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "new-0.safetensors").write_bytes(b"a picture that is to be deleted")
    name = request_deletion(here.ledger, {"source": GONE}, actor="ann", reason="r").id
    here.maintain(runs=2)
    here.follow()
    assert row_of(here, name).state == "removed"
    assert caption("gone-1") not in here.learnable() | here.searchable("aaaa")
    assert here.ledger.list_deletions_in("update-running", pinned) == [], "it was begun before"
    here.ledger.advance_update("update-running", "failed", error="stopped")  # its process was killed after that
    here.maintain()
    assert not prepared.exists()
    check_it_is_nowhere(here, "gone-1", "gone-2")
    assert row_of(here, name).state == "done"
    assert json.dumps(row_of(here, name).adapters)
