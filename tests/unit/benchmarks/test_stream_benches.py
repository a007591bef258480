from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stream import amplification
from benchmarks.stream.chaos_audit import Audit, OffsetWatch, audit
from benchmarks.stream.chaos_plan import plan
from benchmarks.stream.chaos_records import Made, make_records
from benchmarks.stream.filling import fill, sample_rows
from benchmarks.stream.growth import Growth
from benchmarks.stream.ingest import figures_of
from benchmarks.stream.jpegs import canvas, jpegs
from benchmarks.stream.ratchet_process import write_settings
from benchmarks.stream.throughput import Throughput
from core.loading import load_settings
from core.settings import Settings
from core.settings.streams import Ingest, Kafka
from ratchet_client.images import decode_image
from streams.ingest.validate import Accepted, Received, Rules, validate
from streams.store.rows import Position
from streams.store.sample_store import SampleStore

TARGETS = ("worker 0", "worker 1", "maintain", "broker", "disk")


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_images_have_about_the_size_that_was_asked_for_and_no_two_are_alike(size: int) -> None:
    images = list(jpegs(canvas(size), 12))
    assert len(set(images)) == 12
    assert sum(map(len, images)) / 12 == pytest.approx(size, rel=0.15)
    assert images[0].startswith(b"\xff\xd8") and decode_image(images[0], 10**7, 10**7, 8).mode == "RGB"


def test_a_seed_gives_the_same_faults_again_and_those_of_one_target_do_not_overlap() -> None:
    faults = plan(600, 3, TARGETS)
    assert faults == plan(600, 3, TARGETS) != plan(600, 4, TARGETS)
    assert {fault.target for fault in faults} == set(TARGETS)
    assert {fault.kind for fault in faults if fault.target == "worker 0"} == {"kill", "stop"}
    for target in TARGETS:
        own = [fault for fault in faults if fault.target == target]
        assert all(first.at + first.seconds < second.at for first, second in pairwise(own))
    assert max(fault.at + fault.seconds for fault in faults) <= 600


def test_a_twentieth_of_the_records_is_bad_and_ingest_agrees_on_which() -> None:
    rules = Rules(Ingest())
    records = list(make_records(1000, 5))
    assert 30 <= sum(record.kind == "bad" for record in records) <= 70
    for number, record in enumerate(records):
        result = validate(Received("samples", 0, number, record.value, b"chaos", record.headers), rules)
        assert isinstance(result, Accepted) == (record.kind == "good"), record.headers
        assert not isinstance(result, Accepted) or result.row["id"] == record.id
    ids = Counter(record.id for record in records if record.kind == "good")
    assert max(ids.values()) > 1, "none is a repetition"


def refused(offset: int) -> dict[str, Any]:
    return {"kind": "quarantine", "topic": "t", "partition": 0, "offset": offset, "reason": "empty"}


def stored(tmp_path: Path, rows: list[dict[str, Any]], end: int = 10) -> SampleStore:
    store = SampleStore(str(tmp_path))
    store.put(rows, [Position("t", 0, end)])
    return store


def good(rows: list[dict[str, Any]], number: int) -> Made:
    return Made("good", b"", [], rows[number]["id"])


BAD = Made("bad", b"", [])


def judge(store: SampleStore, places: dict[int, Made], messages: tuple[int, ...]) -> Audit:
    return audit(
        "t", {(0, offset): made for offset, made in places.items()}, store, [("t", 0, each) for each in messages]
    )


def test_the_audit_finds_nothing_where_all_is_well(tmp_path: Path) -> None:
    rows = sample_rows("t", 0, 2)[0].to_pylist()
    result = judge(stored(tmp_path, [*rows, refused(2)]), {0: good(rows, 0), 1: good(rows, 1), 2: BAD}, (2,))
    assert result == Audit()


def test_the_audit_finds_each_kind_of_fault(tmp_path: Path) -> None:
    rows = sample_rows("t", 0, 4)[0].to_pylist()
    again = {**rows[1], "offset": 5}
    store = stored(tmp_path, [rows[0], rows[0], rows[1], again, rows[2], refused(6), refused(7), refused(8)])
    places = {0: good(rows, 0), 1: good(rows, 1), 5: good(rows, 1), 9: good(rows, 3), 6: BAD, 7: BAD, 8: good(rows, 3)}
    result = judge(store, places, (6, 6, 8))
    assert result.lost == 2, "9 has no row, 7 is not in the topic"
    assert result.double == 4, "0 twice, its id twice, the id of 1 twice, a row at 2 that nobody produced"
    assert (result.quarantine_double, result.misjudged) == (1, 1)
    assert len(result.evidence) == 8


def test_a_position_that_goes_backwards_is_seen(tmp_path: Path) -> None:
    store = SampleStore(str(tmp_path))
    store.put([], [Position("t", 0, 10)])
    watch = OffsetWatch(store)
    watch._look()
    store.put([], [Position("t", 0, 9)])
    watch._look()
    assert watch.backwards == 1


def test_the_settings_of_a_benchmark_reach_its_processes(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, kafka=Kafka(topic="bench", client={"session_timeout_ms": "9000"}))
    loaded = load_settings(write_settings(settings, tmp_path / "settings.json"), environ={})
    assert loaded.model_dump(exclude={"access"}) == settings.model_dump(exclude={"access"})


def test_a_filled_store_has_what_was_asked_for_and_goes_on_from_there(tmp_path: Path) -> None:
    fill(str(tmp_path), 300, 0)
    fill(str(tmp_path), 500, 300)
    store = SampleStore(str(tmp_path))
    assert store.count(split="train") == store.scan(columns=["id"]).num_rows == 500
    assert len(set(store.scan(columns=["id"])["id"].to_pylist())) == 500


def test_what_maintenance_writes_is_counted_by_its_files(tmp_path: Path) -> None:
    result = amplification.measure(tmp_path, rows=2_000, commit_rows=50, commits_a_run=10, image_bytes=500)
    assert 1_000_000 < result.ingested < 4_000_000
    assert 0 < result.ratio < 3
    assert SampleStore(Settings(home=tmp_path).lake).count() == 2_000


def test_the_demanded_figures_are_the_worst_of_what_was_measured() -> None:
    def run(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_seconds": 1.0, "memory": 2**20}

    rates = [
        Throughput(20_000, 100, [run(0.5), run(0.5)], [run(1), run(3)], [run(2), run(2)], [run(1), run(1)]),
        Throughput(100_000, 100, [run(0.4)], [run(1)], [run(2)], [run(1)]),
    ]
    growths = [Growth(10, 0.1, 0.2, 100, 1, 1), Growth(1000, 0.12, 0.3, 110, 9, 5)]
    writes = [
        amplification.Amplification(10, 1, 1, 100, 50, 10, 1),
        amplification.Amplification(10, 1, 1, 100, 90, 5, 1),
    ]
    figures = figures_of(rates, growths, writes)
    assert (figures["ratio_to_bare"], figures["ratio_to_bare_two"], figures["ratio_to_fetch"]) == (0.5, 1.0, 0.2)
    assert (figures["commit_growth"], figures["memory_growth"]) == (1.2, 1.1)
    assert (figures["write_amplification"], figures["start_seconds_at_1m"]) == (0.95, 9)
