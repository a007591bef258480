"""Records are validated in processes: as here, in order, and whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from core.settings.streams import Ingest, Kafka
from streams.ingest import validators
from streams.ingest.membership import Reading
from streams.ingest.validate import Accepted, Received, StoreRow, validate
from streams.ingest.validators import (
    CrashGuard,
    Notes,
    ProcessValidators,
    ValidationPool,
    Work,
)
from streams.store.rows import Position
from streams.store.writer import Claim
from tests.support.kafka import good, picture, wait_for

WORK = Work(Ingest(), Kafka())
DEADLY = b"deadly"


class MortalProcesses(ProcessValidators):
    """Processes of which one dies over a certain record."""

    deaths = 0

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        """As always; but the process that gets this record dies."""
        if not any(received.key == DEADLY for received in records):
            return super().submit(records)
        self.deaths += 1
        return self._pool.submit(die, records)


def die(records: Sequence[Received]) -> list[Accepted | StoreRow]:
    """In the process: end as a crash of a decoder would."""
    [deadly] = [received for received in records if received.key == DEADLY]
    with validators._notes.validating(deadly.record_position):
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


@contextmanager
def guarded(folder: Path, kind: type[ProcessValidators] = ProcessValidators) -> Iterator[Any]:
    """Two processes that validate, and what counts their deaths."""
    with closing(CrashGuard(folder, 2)) as guard:
        validators = kind(WORK, 2, guard)
        try:
            yield validators
        finally:
            validators.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessValidators]:
    with guarded(tmp_path_factory.mktemp("guard")) as validators:
        yield validators


def received(offset: int, key: bytes | None = None) -> Received:
    value, headers = good(offset) if offset % 3 else (b"poison %d" % offset, [])
    return Received("t", 0, offset, value, key, headers, 1_700_000_000_000)


def reading() -> Reading:
    return Reading.of(Claim(Position("t", 0, 0), 1))


def results(pool: ValidationPool, records: list[Received]) -> list[Accepted | StoreRow]:
    mine = reading()
    for record in records:
        pool.add(mine, record, 0)
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
from streams.ingest.validators import CrashGuard
from streams.ingest.validators import ProcessValidators, Work
if __name__ == "__main__":
    guard = CrashGuard(Path(__file__).parent, 2)
    validators = ProcessValidators(Work(Ingest(), Kafka()), 2, guard)
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
