"""A deletion followed through every place that had the sample, until its bytes are gone from the disk."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.ledger import DeletionRow, Ledger
from core.settings import Settings
from ratchet_client.encoding import encode
from ratchet_client.records import Sample
from serving.catalog.catalog import Catalog
from serving.catalog.queries import Search
from serving.catalog.tables import Tables
from serving.releases.types import ReleaseSnapshot
from streams.store import maintenance
from streams.store.deletion import request_deletion
from streams.store.maintenance import Maintainer
from streams.store.sample_store import SampleStore
from tests.support.kafka import picture
from tests.support.worker import Worker
from updater.data.pools import draw_pools
from updater.recipes import load_recipe

HERE, THERE = ReleaseSnapshot(1, None, "aaaa", "t"), ReleaseSnapshot(2, "clip-x", "bbbb", "t")
GONE, KEPT = "withdrawn source", "lasting source"
DIM = 8


def needles(mark: str) -> dict[str, bytes]:
    """What the image and the caption of a sample have inside."""
    digest = hashlib.sha256(mark.encode()).hexdigest()
    return {kind: f"{kind} of {mark} {digest}".encode() for kind in ("image", "caption")}


def caption(mark: str) -> str:
    return needles(mark)["caption"].decode()


def marked(seed: int, mark: str) -> bytes:
    info = PngInfo()
    info.add_text("comment", needles(mark)["image"].decode())
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).save(out, "PNG", pnginfo=info)
    return out.getvalue()


async def vectors(batch: Any, clip: str | None) -> Any:
    return np.stack([np.resize(image.astype(np.float32).ravel() + 1, DIM) for image in batch])


@dataclass
class Installation:
    """The store with an ingest of two partitions, a catalog and the ledger."""

    settings: Settings
    store: SampleStore
    ledger: Ledger
    catalog: Catalog
    workers: Sequence[Worker]

    def send(self, value: bytes | None, key: str, headers: Sequence[tuple[str, bytes]], partition: int) -> None:
        worker = self.workers[partition]
        worker.add(worker.judged(value, headers, key.encode()))
        worker.commit()

    def sample(self, mark: str, source: str, seed: int, partition: int = 0) -> None:
        message = encode(Sample(image=marked(seed, mark), text=caption(mark), source=source, domain="streets"), "raw")
        self.send(message.value, mark, message.headers, partition)

    def refused(self, mark: str, source: str) -> None:
        headers = [("ratchet_source", source.encode()), ("ratchet_text", caption(mark).encode())]
        self.send(needles(mark)["image"] + b" is no picture", mark, headers, 0)

    def settle(self) -> None:
        """Index all that was sent."""

        async def follow() -> None:
            while await self.catalog.reconciler.step():
                pass

        asyncio.run(follow())

    def maintain(self) -> None:
        with closing(Maintainer(self.settings, self.ledger)) as maintainer:
            maintainer.run_once()
        self.settle()

    def begin(self, name: str, start: dict[str, int], end: dict[str, int]) -> None:
        self.ledger.begin_update(
            name, family="clip", recipe={}, seed=0, store_version=self.store.version(), data_from=start, data_to=end,
            incumbent=None,
        )  # fmt: skip

    def learn(self, adapter: str, start: dict[str, int]) -> None:
        """Record an update that learned everything from ``start`` on."""
        self.begin(f"update-{adapter}", start, self.store.offsets())
        self.ledger.advance_update(f"update-{adapter}", "trained", adapter=adapter)
        self.ledger.advance_update(f"update-{adapter}", "done")

    def learnable(self) -> set[str]:
        half = {key: offset // 2 for key, offset in self.store.offsets().items()}
        pools = draw_pools(self.store, load_recipe("default"), (), self.store.version(), half, seed=1)
        return {example.text for example in (*pools.new, *pools.replay)}

    def searchable(self, space: str) -> set[str]:
        found = asyncio.run(self.catalog.search(space, Search([np.ones(DIM, np.float32)], 100)))
        return {hit.text for hits in found.hits for hit in hits}

    def files_with(self, needle: bytes) -> list[str]:
        lake = self.settings.home / "lake"
        found = (path for path in lake.rglob("*") if path.is_file() and needle in path.read_bytes())
        return [str(path.relative_to(lake)) for path in found]

    def deletion(self, name: str) -> DeletionRow:
        row = self.ledger.deletion(name)
        assert row is not None
        return row

    def is_everywhere(self, *marks: str) -> None:
        """Make sure that the test looks in the right places."""
        for mark in marks:
            held = {kind: self.files_with(needle) for kind, needle in needles(mark).items()}
            assert all(any("samples.lance" in file for file in files) for files in held.values()), mark
            tables = {file.split("/")[1] for file in held["caption"] if file.startswith("catalog/")}
            assert tables == {"clip_aaaa.lance", "clip_bbbb.lance"}, mark
            assert caption(mark) in self.learnable() & self.searchable("aaaa") & self.searchable("bbbb"), mark

    def is_nowhere(self, *marks: str) -> None:
        for mark in marks:
            for kind, needle in needles(mark).items():
                assert self.files_with(needle) == [], (mark, kind)
            assert caption(mark) not in self.learnable() | self.searchable("aaaa") | self.searchable("bbbb"), mark
            assert self.store.select(f"text = '{caption(mark)}'", ["id"]) == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """It has samples and refused records of both sources, and two updates that learned from them."""
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr("serving.catalog.reconcile.EXPUNGE_SECONDS", 0.0)
    settings = Settings(home=tmp_path, maintain={"keep_seconds": 0})
    workers = [Worker(tmp_path, partition) for partition in (0, 1)]
    catalog = Catalog(
        Tables(str(tmp_path / "lake" / "catalog"), tmp_path / "index"), workers[0].store,
        lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((2, 2)), np.uint8), vectors,
    )  # fmt: skip
    asyncio.run(catalog.adopt([THERE, HERE]))
    with closing(Ledger.open(settings.ledger)) as ledger:
        made = Installation(settings, workers[0].store, ledger, catalog, workers)
        samples = [
            ("gone-1", GONE, 0),
            ("kept-1", KEPT, 0),
            ("gone-2", GONE, 1),
            ("kept-2", KEPT, 1),
            ("by-key", KEPT, 1),
        ]
        for seed, (mark, source, partition) in enumerate(samples, 900):
            made.sample(mark, source, seed, partition)
        made.refused("refused-gone", GONE)
        made.refused("refused-kept", KEPT)
        made.learn("clip-learned", {})
        learned = made.store.offsets()
        made.sample("kept-3", KEPT, 950)
        made.learn("clip-later", learned)
        made.settle()
        yield made


def test_a_source_and_a_key_leave_every_place_and_the_receipts_name_what_learned_from_them(here: Installation) -> None:
    here.is_everywhere("gone-1", "gone-2", "kept-1", "by-key")
    assert len(here.store.quarantined(10, source=GONE)) == 1
    assert here.files_with(needles("refused-gone")["image"]) != []
    ids = here.store.select(f"source = '{GONE}' AND kind = 'sample'", ["id"])
    here.begin("update-over", {}, {})
    here.store.pin("update-over", here.store.version())
    here.ledger.advance_update("update-over", "failed", error="stopped")  # its process was killed after that
    prepared = here.settings.update_folders / "update-over" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "new-0.safetensors").write_bytes(marked(900, "gone-1"))
    name = request_deletion(here.ledger, {"source": GONE}, actor="ann", reason="consent withdrawn").id
    here.maintain()
    assert not prepared.exists()
    here.is_nowhere("gone-1", "gone-2")
    assert here.files_with(needles("refused-gone")["image"]) == []
    assert here.store.quarantined(10, source=GONE) == []

    row = here.deletion(name)
    assert (row.state, row.samples, row.refusals) == ("done", 2, 1)
    assert row.adapters == {"learned": ["clip-learned"], "may_have_replayed": ["clip-later"]}
    assert row.removed_at is not None and row.done_at is not None
    audit = {each.action: each for each in here.ledger.audit_rows(subject=f"deletion {name}")}
    assert (audit["delete"].actor, audit["deleted"].detail["samples"]) == ("ann", 2)
    [event] = [each for each in here.ledger.waiting_events() if each.type == "ratchet.deletion.v1"]
    assert event.data["adapters"]["learned"] == ["clip-learned"] and event.subject == f"deletion {name}"
    here.begin("update-next", {}, {})
    listed = here.ledger.list_deletions_in("update-next", here.store.version())
    assert [each.id for each in listed] == [name] and here.deletion(name).update_id == "update-next"
    here.ledger.advance_update("update-next", "failed")
    for each in ids:
        receipts = here.store.select(f"id = '{each['id']}'", ["kind", "reason", "detail"])
        assert receipts == [{"kind": "deleted", "reason": "deletion", "detail": name}]
    kept = {caption(mark) for mark in ("kept-1", "kept-2", "kept-3", "by-key")}
    assert here.learnable() == here.searchable("aaaa") == here.searchable("bbbb") == kept
    assert len(here.store.quarantined(10, source=KEPT)) == 1
    left = here.store.scan(columns=["id"])["id"].to_pylist()
    assert here.store.image(left).keys() == set(left)

    here.send(None, "by-key", [], partition=1)  # a tombstone
    here.maintain()
    here.is_nowhere("by-key")
    [row] = [each for each in here.ledger.deletions() if each.id != name]
    assert (row.state, row.samples, row.actor) == ("done", 1, "producer")
    assert row.id.startswith("tombstone ") and row.adapters["learned"] == ["clip-learned"]
    here.sample("by-key", KEPT, 904, partition=1)  # what is sent after it is a sample again
    here.maintain()
    here.is_everywhere("by-key")
    assert len(here.ledger.deletions()) == 2
