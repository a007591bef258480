from __future__ import annotations

import base64
import errno
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.errors import RegistryUnavailable, StoreFull
from core.settings.streams import Ingest, Kafka
from ratchet_client.records import REASONS
from streams.ingest import validate as module
from streams.ingest.membership import PartitionReader
from streams.ingest.quarantine import message, original
from streams.ingest.validate import Accepted, Received, Rules, StoreRow, quarantine_row, record_time, validate
from streams.ingest.validators import (
    DEATHS,
    CrashGuard,
    Notes,
    ProcessValidators,
    ValidationPool,
    ValidationSetup,
)
from streams.store.rows import Position, record_key
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim
from tests.support.hostile_images import png
from tests.support.kafka import good, picture
from tests.unit.streams.deaths import DEADLY, die_over

RULES = Rules(Ingest())
HALF = "\ud83d"
Headers = Sequence[tuple[str, bytes | None]]


def received(value: bytes | None, headers: Headers = (), offset: int = 0, **fields: Any) -> Received:
    return Received("t", 0, offset, value, fields.pop("key", None), headers, **fields)


def record(**fields: Any) -> bytes:
    image = base64.b64encode(fields.pop("picture", None) or picture(1)).decode()
    return json.dumps({"image": image, "text": "a boat", **fields}).encode()


def raw(seed: int = 1, **fields: Any) -> Received:
    return received(*good(seed), **fields)


def accepted(received: Received) -> dict[str, Any]:
    result = validate(received, RULES)
    assert isinstance(result, Accepted), result
    return result.row


def refused(received: Received) -> dict[str, Any]:
    row = validate(received, RULES)
    assert not isinstance(row, Accepted) and row["kind"] == "quarantine" and row["reason"] in REASONS, row
    return row


def tombstone(*given: Any, **fields: Any) -> tuple[bytes | None, str | None]:
    row = validate(received(None, *given, **fields), RULES)
    assert isinstance(row, dict) and row["kind"] == "tombstone", row
    return row["key"], row["id"]


SECONDS = 1_790_000_000


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (SECONDS * 1000 + 250, SECONDS + 0.25),
        (SECONDS * 10**6 + 250_000, SECONDS + 0.25),
        (SECONDS * 10**9 + 250_000_000, SECONDS + 0.25),
        (0, None),
        (-(2**63), None),
        (2**63 - 1, None),
    ],
)
def test_any_create_time_is_a_time_or_none(timestamp: int, expected: float | None) -> None:
    time = None if expected is None else datetime.fromtimestamp(expected, UTC)
    assert record_time(timestamp) == time
    before = datetime.now(UTC)
    stored = accepted(raw(timestamp=timestamp))["time"]
    assert stored == time if time else before <= stored <= datetime.now(UTC)
    named = accepted(received(record(time="2026-01-02T03:04:05+02:00"), timestamp=timestamp))
    assert named["time"] == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC), "a time in the record counts more"


def test_a_null_value_with_a_key_or_an_id_is_a_tombstone() -> None:
    named = [("ratchet_id", b"ab" * 32)]
    assert tombstone(key=b"photo-7") == (b"photo-7", None)
    assert tombstone(named) == (None, "ab" * 32)
    assert tombstone(named, key=b"photo-7") == (b"photo-7", "ab" * 32)
    assert accepted(raw(key=b"k" * 256))["key"] == b"k" * 256
    long = accepted(raw(key=b"k" * 257))["key"]
    assert long == tombstone(key=b"k" * 257)[0] == record_key(b"k" * 257) and len(long) == 32, "by its digest"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        *(([("ratchet_id", name)], "headers") for name in (b"", b"ab", b"AB" * 32, b"\xff" * 64, b"ab" * 32 + b"\n")),
        *((headers, "empty") for headers in ([], [("ratchet_id", None)], [("other", b"x")])),
    ],
)
def test_a_null_value_that_names_nothing_is_refused_and_deletes_nothing(headers: Headers, reason: str) -> None:
    for key in (None, b"photo-7" if reason == "headers" else b""):
        assert refused(received(None, headers, key=key))["reason"] == reason


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("fault", [ZeroDivisionError("division by zero"), PanicException("index out of bounds")])
def test_a_fault_of_ours_refuses_the_record_and_does_not_stop_the_stream(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def fail(image: object) -> None:
        raise fault

    monkeypatch.setattr(module, "perceptual_hash", fail)
    row = refused(raw(offset=3, key=b"k"))
    assert (row["reason"], row["offset"], row["original"], row["original_key"]) == ("internal", 3, picture(1), b"k")
    assert row["detail"] == f"{type(fault).__name__}: {fault}"


def test_what_validation_needs_and_is_away_is_no_fault_of_the_record() -> None:
    class Away:
        def read(self, value: bytes) -> dict[str, Any]:
            raise RegistryUnavailable("away")

    with pytest.raises(RegistryUnavailable):
        validate(received(b"\0\0\0\0\1{}"), Rules(Ingest(), registry=Away()))  # type: ignore[arg-type]


def test_a_quarantined_record_can_be_sent_again_as_it_came() -> None:
    headers: Headers = [("ratchet_text", b""), ("trace", b"\xff\x00"), ("none", None), ("ce_source", b"urn:\xff")]
    row = refused(Received("t@2", 1, 9, b"\xff\xfe", b"\x00key", headers))
    assert row["source"] == "urn:\ufffd"
    record, sent = original(row), message(row)
    given = [(name, value) for name, value in headers if value is not None]
    assert (record.value, record.key, record.headers) == (b"\xff\xfe", b"\x00key", given)
    assert (sent.value, sent.key, sent.headers[:3]) == (record.value, record.key, given)
    ours = dict(sent.headers[3:])
    assert ours["ratchet_null_headers"] == b'["none"]', "an empty header would be another one"
    assert [ours[f"ratchet_{name}"] for name in ("topic", "partition", "offset")] == [b"t@2", b"1", b"9"]
    assert ours["ratchet_reason"] == b"headers"
    row = quarantine_row(received(None), "corrupt", f"x{HALF}y" * 1000)
    assert (row["original"], len(row["detail"]), message(row).value) == (None, 500, b""), "corrupt, without bytes"


HOSTILE: dict[str, Received] = {
    "half a surrogate in a text": received(record(text=f"x{HALF}y")),
    "half a surrogate in image_uri": received(json.dumps({"image_uri": f"https://{HALF}/", "text": "t"}).encode()),
    "half a surrogate in a header's name": received(picture(1), [(f"ratchet_{HALF}", b"x"), ("ratchet_text", b"t")]),
    "NUL in all fields": received(record(**dict.fromkeys(("text", "domain", "source", "concept", "label"), "x\0y"))),
    "a huge unknown integer": received(record(x=10**300, y=-(2**64), z=2**63)),
    "an unknown integer of 5000 digits": received(b'{"x": ' + b"9" * 5000 + b', "image": "aGk=", "text": "t"}'),
    "year 1 in an eastern zone": received(record(time="0001-01-01T00:00:00+14:00")),
    "a claimed width of 2^32-1": received(record(picture=png(2**32 - 1, 2**32 - 1, 8, 0, b"\0" * 9))),
    "a long key": raw(key=b"\xff" * 100_000),
    "the largest offset": Received("t", 2**31 - 1, 2**63 - 2, *good(1)[:1], None, good(1)[1]),
    "no value, hostile key": received(None, key=b"' OR '1'='1\0\xff"),
    "extra in a header": received(picture(1), [("ratchet_text", b"t"), ("ratchet_extra", b'{"a": "\\ud83d"}')]),
}


def test_a_hostile_record_becomes_a_row_that_the_store_takes(store: SampleStore) -> None:
    results = [validate(each, RULES) for each in HOSTILE.values()]
    rows = [{**each.row, "split": "train"} if isinstance(each, Accepted) else each for each in results]
    placed = [{**row, "topic": "t", "partition": 0, "offset": number} for number, row in enumerate(rows)]
    store.put(placed, [Position("t", 0, len(rows))])
    dataset = store.table.open()
    assert dataset is not None
    found = {row["offset"]: row for row in dataset.to_table(filter="kind != 'position'").to_pylist()}
    for number, (name, row) in enumerate(zip(HOSTILE, placed, strict=True)):
        if row["kind"] == "quarantine":
            assert row["reason"] in REASONS - {"internal"}, f"{name}: {row['detail']}"
            message(row)
        assert {column: found[number][column] for column in row} == row, name


WORK = ValidationSetup(Ingest(), Kafka())


class MortalProcesses(ProcessValidators):
    """Processes of which one dies over a certain record."""

    deaths = 0

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        if not any(received.key == DEADLY for received in records):
            return super().submit(records)
        self.deaths += 1
        return self._pool.submit(die_over, records)


@contextmanager
def guarded(folder: Path, kind: type[ProcessValidators] = ProcessValidators, count: int = 1) -> Iterator[Any]:
    with closing(CrashGuard(folder, count)) as guard:
        validators = kind(WORK, count, guard)
        try:
            yield validators
        finally:
            validators.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessValidators]:
    with guarded(tmp_path_factory.mktemp("guard"), count=2) as validators:
        yield validators


def numbered(offset: int, key: bytes | None = None) -> Received:
    value, headers = good(offset) if offset % 3 else (b"poison %d" % offset, [])
    return Received("t", 0, offset, value, key, headers, 1_700_000_000_000)


def results(pool: ValidationPool, records: list[Received]) -> list[Accepted | StoreRow]:
    reading = PartitionReader.of(Claim(Position("t", 0, 0), 1))
    for record in records:
        pool.add(reading, record, 0)
    pool.flush()
    taken = []
    while len(pool):
        pool.wait(20)
        taken += pool.take()
    assert [each.end for each in taken] == [record.offset + 1 for record in records]
    return [each.result for each in taken]


def plain(result: Accepted | StoreRow) -> StoreRow:
    row = dict(result.row if isinstance(result, Accepted) else result)
    row.pop("ingested_at")
    return row


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_what_comes_back_is_what_validation_here_gives_with_its_bytes(processes: ProcessValidators) -> None:
    records = [numbered(n) for n in range(40)]
    mine = [plain(validate(record, WORK.rules())) for record in records]
    theirs = results(ValidationPool(processes, 1 << 24, 1000), records)
    assert [plain(each) for each in theirs] == mine
    accepted = [(each, record) for each, record in zip(theirs, records, strict=True) if isinstance(each, Accepted)]
    assert all(each.record is record for each, record in accepted)
    assert mine[1]["image"] == picture(1) and mine[0]["original"] == b"poison 0"
    assert "end-with-parent" in processes._pool.submit(thread_names).result(60), (
        "they end when their consumer is killed"
    )


def test_a_record_that_kills_its_process_three_times_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    with guarded(tmp_path, MortalProcesses) as validators:
        records = [numbered(n, DEADLY if n == 4 else None) for n in range(12)]
        taken = results(ValidationPool(validators, 1 << 24, 1000), records)
        refused = plain(taken[4])
        assert (refused["reason"], refused["original"]) == ("crashed", records[4].value)
        assert [plain(each)["kind"] for number, each in enumerate(taken) if number != 4] == [
            "sample" if record.offset % 3 else "quarantine" for record in records if record.offset != 4
        ]
        assert validators.deaths == 3, "with its chunk, and twice alone"


def test_deaths_of_processes_are_counted_over_a_restart_of_their_consumer(tmp_path: Path) -> None:
    deadly = numbered(4, DEADLY)
    for deaths in (1, 2, 3):
        with guarded(tmp_path, MortalProcesses) as validators:
            with pytest.raises(BrokenProcessPool):
                validators.submit([deadly]).result()
            validators._count_deaths()
            assert validators._guard.deaths(deadly.record_position) == deaths
    with guarded(tmp_path) as validators:
        assert plain(validators.alone(deadly))["reason"] == "crashed", "it is not validated once more"


def test_what_a_process_validates_when_its_consumer_is_killed_is_a_death_too(tmp_path: Path) -> None:
    position = numbered(4).record_position
    child = os.fork()
    if child == 0:
        guard = CrashGuard(tmp_path, 2)
        with Notes.of_process(guard.path, 1, 1).validating(position):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert guard.deaths(position) == 1


POISON, NEIGHBOUR = ("t", 0, 7), ("t", 0, 8)


def die(folder: Path, *positions: tuple[str, int, int]) -> None:
    """In a process of its own: be killed while these records are validated."""
    child = os.fork()
    if child == 0:
        with ExitStack() as stack:
            guard = CrashGuard(folder, 4)
            for position in positions:
                stack.enter_context(guard.notes.validating(position))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_ended_well_or_raised_or_is_still_validated_at_a_stop_is_no_death(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    guard = CrashGuard(tmp_path, 1)
    with guard.notes.validating(POISON):
        pass
    with pytest.raises(ValueError, match="bad"), guard.notes.validating(POISON):
        raise ValueError("bad")

    def work() -> None:
        with guard.notes.validating(POISON):
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    guard.close()
    go_on.set()
    thread.join()
    with closing(CrashGuard(tmp_path, 1)) as next_guard:
        assert next_guard.deaths(POISON) == 0


def test_workers_beside_each_other_do_not_count_each_others_records_and_one_that_takes_over_counts_all(
    tmp_path: Path,
) -> None:
    with closing(CrashGuard(tmp_path, 2)) as one, one.notes.validating(POISON):
        with closing(CrashGuard(tmp_path, 2)) as other, other.notes.validating(NEIGHBOUR):
            assert other.deaths(POISON) == 0
        with closing(CrashGuard(tmp_path, 2)) as third:
            assert (third.deaths(POISON), third.deaths(NEIGHBOUR)) == (0, 0)
    die(tmp_path, *(("t", 0, number) for number in range(4)))
    with closing(CrashGuard(tmp_path, 1)) as guard:  # with fewer threads
        assert [guard.deaths(("t", 0, number)) for number in range(5)] == [1, 1, 1, 1, 0]
        with guard.notes.validating(POISON):
            pass


def test_a_full_disk_is_told_apart_and_loses_no_death_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(tmp_path, POISON)
    files = len(list(Path("/proc/self/fd").iterdir()))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("os.posix_fallocate", "streams.ingest.validators.replace_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            for _ in range(3):
                with pytest.raises(StoreFull, match="full"):
                    CrashGuard(tmp_path, 1)
        die(tmp_path, POISON)
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    with closing(CrashGuard(tmp_path, 1)) as guard:
        assert guard.deaths(POISON) == DEATHS
    assert not (tmp_path / "validating-1").exists()
