"""Writes a small lake, and a home in the middle of an update, for the tests that open them with later code.

    python -m tests.support.written_state tests/data/written_by_0_1

Run it with the code whose format is to be kept; a committed folder is never written again. (But once: the ledger of
``0_1`` is at migration 0014, from before the first version.)
"""

from __future__ import annotations

import base64
import json
import signal
import sqlite3
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from core.ledger import Ledger
from core.settings import Settings
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.validate import Received
from streams.store import deletion
from streams.store.sample_store import SampleStore
from tests.integration.updater import mortal_trainer
from tests.integration.updater.home import add_samples, judged_as, make_home, release
from tests.support.kafka import picture
from tests.support.pictures import png
from tests.support.worker import Worker
from tests.unit.updater.builders import recipe
from updater.service.update_loop import UpdaterService

DATA = Path(__file__).parents[1] / "data"
TOPIC = "t"
COLUMNS = (
    "kind", "topic", "partition", "offset", "id", "split", "text", "question", "answer", "domain", "source", "concept",
    "label", "tags", "extra", "size", "width", "height", "time", "ingested_at", "key", "look", "words", "reason",
    "duplicate_of", "original",
)  # fmt: skip
SOURCES = ("urn:cam", "crawler", "")
LIMIT_BYTES = 300_000


def records() -> Iterator[Received]:
    """Records of two partitions: samples of several kinds, duplicates, invalid records and tombstones."""
    offsets, sent = [0, 0], dict[int, tuple[bytes, dict[str, str]]]()

    def received(value: bytes | None, key: bytes | None, partition: int = 0, **fields: str) -> Received:
        offsets[partition] += 1
        headers = [(f"ratchet_{name}", text.encode()) for name, text in fields.items()]
        return Received(TOPIC, partition, offsets[partition] - 1, value, key, headers, 1_767_225_600_000)

    for number in range(48):
        asked = {"question": "which number is it?", "answer": str(number)}
        words = asked if number % 6 == 5 else {"text": f"picture {number}"}
        more = {"domain": ("streets", "forms")[number % 2], "source": SOURCES[number % 3], "label": f"l{number % 4}"}
        key = None if number % 8 == 7 else b"k" * 300 if number == 9 else b"key-%d" % number
        kind = ("PNG", "JPEG", "WEBP")[number % 3]
        yield received(picture(number, kind=kind), key, number % 2, **words, **more, concept=f"c{number % 5}")
        if number in (3, 4, 5):  # again, and from others
            sent[number] = (picture(number, kind=kind), words)
    for number in range(4):  # as a camera of one colour sends them
        plain_picture = png((40 * number, 20, 200), (40, 30))
        yield received(plain_picture, b"plain-%d" % number, 1, text="a plain picture", domain="plain")
    for (image, words), sender in zip(sent.values(), (b"key-3", b"another", None), strict=True):
        yield received(image, sender, 0, **words)
    yield received(b"no picture", b"bad-1", 0, text="a text", source="crawler")
    yield received(b"no picture either", b"b" * 300, 1, text="a text")
    yield received(None, b"key-2", 0)
    yield received(None, b"nobody", 1)


def write_lake(folder: Path) -> dict[str, Any]:
    """Write a lake in ``folder``, called ``lake``, and return its contents."""
    store = SampleStore(str(folder))
    split = SplitRule(store.table.identity()[1], 0.15)
    workers = [Worker(folder.parent, partition, distance=-1, split=split) for partition in (0, 1)]
    for number, record in enumerate(records(), 1):
        worker = workers[record.partition]
        worker.add(worker.judged(record.value, record.headers, record.key, record.timestamp))
        if number % 25 == 0:
            for each in workers:
                each.commit()
    for each in workers:
        each.commit()
    with TemporaryDirectory() as scratch, closing(Ledger.open(f"sqlite:///{scratch}/ledger.db")) as ledger:
        deletion.take_tombstones(store, ledger)
        for wanted in ledger.deletions(10, ["requested"], oldest_first=True):
            deletion.remove(store, ledger, [wanted])
    return contents(store)


def contents(store: SampleStore) -> dict[str, Any]:
    rows = [{name: plain(row[name]) for name in COLUMNS} for row in store.select("kind != 'position'", COLUMNS)]
    rows.sort(key=lambda row: (row["topic"], row["partition"], row["offset"], row["kind"]))
    name, split_key = store.table.identity()
    positions = {key: plain(each.row()) for key, each in store.positions().items()}
    tally = {key: value for key, value in sorted(store.tally().items()) if value}
    return {"store": name, "split_key": split_key.hex(), "rows": rows, "positions": positions, "tally": tally}


def small_home(folder: Path) -> Settings:
    settings = make_home(folder)
    (folder / "default.yaml").write_text(recipe("default", max_steps=6, reference_limit=20, rank=1).to_yaml())
    return settings


def write_home(folder: Path) -> dict[str, Any]:
    """A home in ``folder``: a release, an open proposal, a hold, and a second update whose trainer was killed."""
    settings = small_home(folder)
    add_samples(settings, 12)
    add_samples(settings, 6, split="fresh_eval")
    with pytest.MonkeyPatch.context() as patch, closing(Ledger.open(settings.ledger)) as ledger:
        judged_as("passed", patch)
        UpdaterService(settings).step()
        release(ledger)
    add_samples(settings, 12)
    killed = mortal_trainer.start(settings.home, "in the middle of training")
    assert killed.wait(400) == -signal.SIGKILL, killed.output()
    with closing(Ledger.open(settings.ledger)) as ledger:
        live = ledger.live()
        assert live is not None
        ledger.propose("release", clip=live.clip, actor="ann", reason="half of the requests", share=0.5)
        ledger.hold("ann", "a holiday")
        ledger.create_key("camera", ["publish"], actor="ann")
        described = described_home(ledger)
    with closing(sqlite3.connect(folder / "ledger.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert list((settings.home / "updates").glob("*/checkpoint.safetensors"))
    return described


def described_home(ledger: Ledger) -> dict[str, Any]:
    tables: dict[str, Sequence[Any]] = {
        "releases": ledger.releases(), "proposals": ledger.proposals(), "updates": ledger.updates(),
        "verdicts": ledger.verdicts(), "keys": ledger.api_keys(), "audit": ledger.audit_rows(),
    }  # fmt: skip
    rows = {name: [plain(asdict(row)) for row in each] for name, each in tables.items()}
    held = ledger.held()
    return {**rows, "held": None if held is None else plain(asdict(held)), "gflops_spent": ledger.spent()}


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {name: plain(each) for name, each in value.items()} if isinstance(value, dict) else value


def pack(folder: Path, to: Path, described: dict[str, Any], *names: str) -> None:
    with tarfile.open(to.with_suffix(".tar.xz"), "w:xz") as tar:
        for name in names:
            tar.add(folder / name, name)
    size = to.with_suffix(".tar.xz").stat().st_size
    assert size < LIMIT_BYTES, f"{to} has {size} bytes"
    text = json.dumps(described, indent=1, ensure_ascii=False, sort_keys=True)
    to.with_suffix(".json").write_text(text + "\n")


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder


if __name__ == "__main__":
    to = Path(sys.argv[1])
    with TemporaryDirectory() as work:
        pack(Path(work), to / "lake", write_lake(Path(work) / "lake"), "lake")
    with TemporaryDirectory() as work:
        home = Path(work) / "home"
        pack(home, to / "home", write_home(home), "ledger.db", "lake", "artifacts/adapters", "updates")
