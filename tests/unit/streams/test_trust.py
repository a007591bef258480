"""Sources that a producer cannot claim, and samples that are held."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core.settings.streams import Ingest, Kafka
from core.settings.trust import SourceRule, Trust
from ratchet_client.records import make_sample
from streams.ingest.sources import Holds, source_of
from streams.ingest.validate import Accepted, Received, Rules, validate
from streams.records.signatures import HEADER, sign
from streams.store.rows import ACCEPTED, Position
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.kafka import picture
from updater.data.draw import draw_rows
from updater.recipes import load_recipe

KEY = b"k" * 32
BOUND = Kafka(topics=[{"name": "cameras", "source": "gate-7"}])  # type: ignore[list-item]


def row(number: int, source: str = "shop", split: str = "train", **more: Any) -> dict[str, Any]:
    name = hashlib.sha256(f"{number}".encode()).hexdigest()
    return {
        "kind": "sample", "id": name, "image": picture(number), "text": f"text {number}", "question": "",
        "answer": "", "source": source, "domain": "d", "split": split, "topic": "samples", "partition": 0,
        "offset": number, "ingested_at": datetime.now(UTC), "size": 10, **more,
    }  # fmt: skip


def stored(tmp_path: Path, *rows: dict[str, Any]) -> SampleStore:
    store = SampleStore(str(tmp_path / "lake"))
    store.put(rows, [Position("samples", 0, len(rows))])
    return store


@pytest.mark.parametrize(
    ("stream", "claimed", "signature", "known"),
    [
        ("samples", "shop", b"", "shop"),
        ("samples", "", b"", ""),
        ("cameras", "shop", b"", "gate-7"),
        ("cameras@2", "", b"", "gate-7"),
        ("samples", "gate-7", b"", "claimed:gate-7"),
        ("samples", "audit", b"", "claimed:audit"),
        ("samples", "feedback:ana", b"forged", "claimed:feedback:ana"),
        ("samples", "feedback:ana", sign(KEY, "id", "feedback:ana"), "feedback:ana"),
        ("samples", "feedback:bob", sign(KEY, "id", "feedback:ana"), "claimed:feedback:bob"),
        ("samples", "feedback:ana", sign(KEY, "other", "feedback:ana"), "claimed:feedback:ana"),
        ("samples", "feedback:" + "x" * 247, b"", ("claimed:feedback:" + "x" * 247)[:256]),
    ],
)
def test_a_source_is_proved_by_its_topic_or_a_signature_and_else_claimed(
    stream: str, claimed: str, signature: bytes, known: str
) -> None:
    assert source_of(BOUND, KEY, stream, claimed, "id", signature) == known


def test_the_source_of_a_record_is_what_is_stored() -> None:
    image = picture(1)
    sample = make_sample({"image": image, "text": "a", "source": "feedback:ana"})
    headers = [("ratchet_text", b"a"), ("ratchet_source", b"feedback:ana")]
    rules = Rules(Ingest(), kafka=BOUND, key=KEY)

    def source(*more: tuple[str, bytes], stream: str = "samples") -> str:
        result = validate(Received(stream, 0, 0, image, headers=[*headers, *more]), rules)
        assert isinstance(result, Accepted)
        return str(result.row["source"])

    assert source() == "claimed:feedback:ana"
    assert source((HEADER, sign(KEY, sample.id, "feedback:ana"))) == "feedback:ana"
    assert source(stream="cameras") == "gate-7"


def test_topics_have_names_and_sources_of_their_own() -> None:
    for twice in ([("a", "x"), ("a", "y")], [("a", "x"), ("b", "x")]):
        with pytest.raises(ValidationError, match="of its own"):
            Kafka(topics=[{"name": name, "source": source} for name, source in twice])  # type: ignore[misc]
    assert BOUND.reading("cameras").group == f"{BOUND.group}.cameras"
    assert BOUND.reading(BOUND.topic) is BOUND
    with pytest.raises(KeyError):
        BOUND.reading("others")


def test_rules_hold_whole_sources_and_what_exceeds_a_day(tmp_path: Path) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    old = [row(number, "cam:1", ingested_at=yesterday) for number in range(5)]
    store = stored(tmp_path, *old, row(5, "cam:1"), row(6, "cam:1", split="held_train"))
    rules = {"new:*": SourceRule(hold=True), "cam:*": SourceRule(per_day=2)}
    holds = Holds(Trust(sources=rules), store.table)

    def placed(source: str | None) -> tuple[str, str]:
        columns = holds.place({"source": source}, "fresh_eval")
        return columns["split"], columns.get("reason", "")

    for _ in range(2):  # a commit that is tried again counts once
        holds.begin(["cam:1", "cam:2", "shop", None])
        assert placed("cam:1") == ("fresh_eval", "")
        assert placed("cam:1") == placed("cam:1") == ("held_fresh_eval", "held_quota")
        assert [placed("cam:2")[1] for _ in range(3)] == ["", "", "held_quota"]
        assert placed("new:vendor") == ("held_fresh_eval", "held_source")
        assert placed("shop") == placed(None) == ("fresh_eval", "")
    holds.stored()
    holds.begin(["cam:1", "cam:2", "shop", None])
    assert placed("cam:1")[1] == placed("cam:2")[1] == "held_quota"


def test_a_held_sample_is_stored_with_a_receipt_and_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [row(number, split="fresh_eval" if number % 3 == 0 else "train") for number in range(9)]
    store = stored(tmp_path, *rows)
    before = store.scan().to_pylist()
    writer = StoreWriter(store.table)
    reasons = {rows[number]["id"]: ("held_agreement", f"number {number}") for number in (0, 1, 2)}
    assert writer.hold({**reasons, "f" * 64: ("held_agreement", "unknown")}) == 3
    assert writer.hold(reasons) == 0  # they are held already
    assert store.tally() == {**store.tally(), "train": 4, "fresh_eval": 2, "held_train": 2, "held_fresh_eval": 1}
    assert store.count() == store.scan().num_rows == 9
    assert store.count(split="train") == store.scan(split="train").num_rows == 4
    (receipt,) = trace(store, ("samples", 0, 1))
    assert (receipt.outcome, receipt.split, receipt.reason, receipt.detail) == (
        "held", "held_train", "held_agreement", "number 1",
    )  # fmt: skip
    assert writer.accept([rows[0]["id"], rows[1]["id"], rows[5]["id"]]) == 2
    assert store.tally()["held_train"] == 1
    writer.accept([rows[2]["id"]])
    assert store.scan().to_pylist() == before
    assert trace(store, ("samples", 0, 1))[0].outcome == "stored"
    writer.hold({rows[1]["id"]: ("held_agreement", "")})
    writer.remove("offset = 1", "deletion", "asked for")
    assert trace(store, ("samples", 0, 1))[0].outcome == "deleted"


def test_what_is_accepted_is_new_to_whoever_had_passed_it(tmp_path: Path) -> None:
    store = stored(tmp_path, *(row(number, split="held_train" if number < 3 else "train") for number in range(6)))
    reached = store.reached()
    assert reached == store.offsets() and store.count(split="train", after=reached) == 0
    StoreWriter(store.table).accept([row(1)["id"]])
    assert store.count(split="train", after=reached) == 1
    assert store.scan(split="train", after=reached, columns=["offset"])["offset"].to_pylist() == [1]
    later = store.reached()
    assert later == {**store.offsets(), ACCEPTED: store.version()} and store.count(split="train", after=later) == 0
    StoreWriter(store.table).accept([row(2)["id"]])
    assert store.scan(split="train", after=later, columns=["offset"])["offset"].to_pylist() == [2]
    drawn = draw_rows(store, load_recipe("default"), store.version(), later, 0, "uniform")
    assert (len(drawn.new), len(drawn.replay)) == (1, 4)
    StoreWriter(store.table).remove("offset < 3", "deletion", "asked for")
    assert store.tally()["accepted"] == 0 and store.reached() == store.offsets()


def test_sources_can_be_left_out_of_what_is_read(tmp_path: Path) -> None:
    sources = ["a", "b", None, "o'brien"]
    store = stored(tmp_path, *(row(number, source) for number, source in enumerate(sources)))  # type: ignore[arg-type]
    assert store.count(split="train", without=["b", "o'brien"]) == 2
    (batch,) = store.addresses(["source"], None, "train", without=["a"])
    assert batch["source"].to_pylist() == ["b", None, "o'brien"]
