"""A store written by an earlier version of Ratchet is opened, migrated and continued: see ``tests/data``."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lance
import pytest

from core.settings.streams import Ingest, Kafka
from core.settings.trust import Trust
from streams.ingest.batch import Batch, CommitResult
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import PartitionReader, start_position
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.sources import Holds
from streams.ingest.validate import Received, Rules, validate
from streams.store.rows import FORMAT
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import picture
from tests.support.written_state import DATA, TOPIC, contents, unpack

Written = tuple[SampleStore, dict[str, Any]]


@pytest.fixture(params=["0_1"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    folder = DATA / f"written_by_{request.param}"
    unpack(folder / "lake.tar.xz", tmp_path)
    return SampleStore(str(tmp_path / "lake")), json.loads((folder / "lake.json").read_text())


def ingest(store: SampleStore, *records: Received) -> CommitResult:
    name, split_key = store.table.identity()
    writer = StoreWriter(store.table)
    known = store.positions().values()
    claims = writer.claim(start_position(known, TOPIC, "id-1", partition, 0) for partition in (0, 1))
    readings = [PartitionReader(claim, claim.position.next) for claim in claims]
    with closing(DuplicateIndex(":memory:", name, -1, SplitRule(split_key, 0.15))) as index:
        batch = Batch(Kafka(), writer, index, Holds(Trust(), writer.table))
        for record in records:
            batch.add(readings[record.partition], record.offset + 1, validate(record, Rules(Ingest())), record.size)
        return batch.commit(lambda reading: None)


def received(partition: int, offset: int, value: bytes | None, key: bytes, **fields: str) -> Received:
    headers = [(f"ratchet_{name}", text.encode()) for name, text in fields.items()]
    return Received(TOPIC, partition, offset, value, key, headers, 1_767_225_600_000)


def test_what_was_stored_is_the_same_before_and_after_a_migration_that_was_interrupted(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, described = written
    before = list(Path(store.url).glob("data/*"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lance.LanceDataset, "update_schema_metadata", MagicMock(side_effect=KeyboardInterrupt))
        store.table.create()
    assert contents(SampleStore(store.lake)) == described
    store.table.create()
    dataset = store.table.open()
    assert dataset is not None and dataset.schema.metadata[b"ratchet.format"].decode() == FORMAT
    assert contents(store) == described
    assert list(Path(store.url).glob("data/*")) == before, "nothing that is stored is written again"
    assert store.version() == SampleStore(store.lake).table.create().version, "it is migrated once"


def test_ingest_goes_on_where_the_earlier_version_stood(written: Written) -> None:
    store, described = written
    old = {(row["partition"], row["offset"]): row for row in described["rows"] if row["kind"] == "sample"}
    three = {"text": "picture 3", "domain": "forms", "source": "urn:cam", "label": "l3", "concept": "c3"}
    outcome = ingest(
        store,
        received(0, 29, picture(3, kind="PNG"), b"another key", **three),  # a duplicate of an old sample
        received(0, 30, picture(900), b"new", text="a new picture", domain="forms"),
        received(0, 31, picture(6, kind="PNG"), b"key-6", text="picture 6", source="urn:cam", label="corrected"),
        received(0, 32, picture(6, kind="PNG"), b"key-6", text="other words", label="l2", domain="streets"),
        received(1, 30, b"no picture", b"bad", text="a"),
        received(1, 31, None, b"key-5"),
    )
    assert (outcome.duplicates, outcome.corrected) == ({"exact": 1}, 1)
    now = contents(store)
    rows = {(row["partition"], row["offset"]): row for row in now["rows"]}
    [corrected] = [place for place, row in old.items() if row["text"] == "picture 6"]
    for place, row in old.items():
        if place != corrected:
            assert rows[place] == row
    assert (rows[corrected]["kind"], rows[corrected]["reason"]) == ("deleted", "corrected")
    assert {rows[0, offset]["split"] for offset in (31, 32)} == {old[corrected]["split"]}
    assert (now["positions"]["t:0"]["offset"], now["positions"]["t:1"]["offset"]) == (33, 32)
    assert (now["store"], now["split_key"]) == (described["store"], described["split_key"])
    assert now["tally"]["sample"] == described["tally"]["sample"] + 2
    assert (now["tally"]["tombstone"], now["tally"]["quarantine"]) == (3, 3)


def test_all_samples_of_then_are_known_when_they_are_sent_again(written: Written) -> None:
    store, described = written
    samples = [row for row in described["rows"] if row["kind"] == "sample"]
    images = store.image([row["id"] for row in samples])

    def again(first: int, **words: str) -> CommitResult:
        fields = [{name: row[name] for name in ("text", "question", "answer")} | words for row in samples]
        records = zip(count(first), samples, fields, strict=False)
        return ingest(store, *(received(0, at, images[row["id"]], b"again", **each) for at, row, each in records))

    assert again(29).duplicates == {"exact": 51}
    again(29 + 51, text="other words", question="", answer="")
    side = {row["look"]: row["split"] for row in samples}
    new = [row for row in contents(store)["rows"] if row["kind"] == "sample"]
    assert len(new) == 2 * len(samples)
    assert all(row["split"] == side[row["look"]] for row in new), "a look that was seen keeps its side"
