from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.errors import StoreFull
from core.settings.streams import Ingest, Kafka
from streams.ingest import validators
from streams.ingest.membership import PartitionReader
from streams.ingest.validate import Accepted, Received, StoreRow, validate
from streams.ingest.validators import (
    DEATHS,
    CrashGuard,
    Notes,
    ProcessValidators,
    ValidationPool,
    ValidationSetup,
)
from streams.store.rows import Position
from streams.store.writer import Claim
from tests.support.kafka import good, picture, wait_for

WORK = ValidationSetup(Ingest(), Kafka())
DEADLY = b"deadly"


class MortalProcesses(ProcessValidators):
    """Processes of which one dies over a certain record."""

    deaths = 0

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        if not any(received.key == DEADLY for received in records):
            return super().submit(records)
        self.deaths += 1
        return self._pool.submit(die_over, records)


def die_over(records: Sequence[Received]) -> list[Accepted | StoreRow]:
    """In the process: end as a crash of a decoder would."""
    [deadly] = [received for received in records if received.key == DEADLY]
    with validators._notes.validating(deadly.record_position):
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


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


def received(offset: int, key: bytes | None = None) -> Received:
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


def test_what_comes_back_is_what_validation_here_gives_with_its_bytes(processes: ProcessValidators) -> None:
    records = [received(n) for n in range(40)]
    mine = [plain(validate(record, WORK.rules())) for record in records]
    theirs = results(ValidationPool(processes, 1 << 24, 1000), records)
    assert [plain(each) for each in theirs] == mine
    assert all(
        each.record is record for each, record in zip(theirs, records, strict=True) if isinstance(each, Accepted)
    )
    assert mine[1]["image"] == picture(1) and mine[0]["original"] == b"poison 0"


def test_a_record_that_kills_its_process_three_times_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    with guarded(tmp_path, MortalProcesses) as validators:
        records = [received(n, DEADLY if n == 4 else None) for n in range(12)]
        taken = results(ValidationPool(validators, 1 << 24, 1000), records)
        refused = plain(taken[4])
        assert (refused["reason"], refused["original"]) == ("crashed", records[4].value)
        assert [plain(each)["kind"] for number, each in enumerate(taken) if number != 4] == [
            "sample" if record.offset % 3 else "quarantine" for record in records if record.offset != 4
        ]
        assert validators.deaths == 3, "with its chunk, and twice alone"


def test_deaths_of_processes_are_counted_over_a_restart_of_their_consumer(tmp_path: Path) -> None:
    deadly = received(4, DEADLY)
    for deaths in (1, 2, 3):
        with guarded(tmp_path, MortalProcesses) as validators:
            with pytest.raises(BrokenProcessPool):
                validators.submit([deadly]).result()
            validators._count_deaths()
            assert validators._guard.deaths(deadly.record_position) == deaths
    with guarded(tmp_path) as validators:
        assert plain(validators.alone(deadly))["reason"] == "crashed", "it is not validated once more"


def test_what_a_process_validates_when_its_consumer_is_killed_is_a_death_too(tmp_path: Path) -> None:
    position = received(4).record_position
    child = os.fork()
    if child == 0:
        guard = CrashGuard(tmp_path, 2)
        with Notes.of_process(guard.path, 1, 1).validating(position):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert guard.deaths(position) == 1


def test_a_stop_is_no_death_of_what_is_being_validated(tmp_path: Path) -> None:
    with guarded(tmp_path) as validators:
        assert plain(validators.alone(received(1)))["kind"] == "sample"
        validators.submit([received(n) for n in range(200)])
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert not any(guard.deaths(received(n).record_position) for n in range(200))


def test_processes_end_when_their_consumer_is_killed(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from core.settings.streams import Ingest, Kafka
from streams.ingest.validators import CrashGuard, ProcessValidators, ValidationSetup
if __name__ == "__main__":
    guard = CrashGuard(Path(__file__).parent, 2)
    validators = ProcessValidators(ValidationSetup(Ingest(), Kafka()), 2, guard)
    validators.submit([]).result()
    print(*validators._pool._processes, flush=True)
    time.sleep(600)
"""
    file = tmp_path / "consumer.py"
    file.write_text(script)
    consumer = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert consumer.stdout is not None
    children = [int(number) for number in consumer.stdout.readline().split()]
    assert len(children) == 2 and all(map(_runs, children))
    consumer.kill()
    consumer.wait()
    wait_for(lambda: not any(map(_runs, children)), "the end of the processes")


def _runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


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


def test_workers_that_live_beside_each_other_do_not_count_each_others_records(tmp_path: Path) -> None:
    with closing(CrashGuard(tmp_path, 2)) as one, one.notes.validating(POISON):
        with closing(CrashGuard(tmp_path, 2)) as other, other.notes.validating(NEIGHBOUR):
            assert other.deaths(POISON) == 0
        with closing(CrashGuard(tmp_path, 2)) as third:
            assert (third.deaths(POISON), third.deaths(NEIGHBOUR)) == (0, 0)


def test_one_that_takes_over_with_fewer_threads_counts_all_that_was_left(tmp_path: Path) -> None:
    die(tmp_path, *(("t", 0, number) for number in range(4)))
    with closing(CrashGuard(tmp_path, 1)) as guard:
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
