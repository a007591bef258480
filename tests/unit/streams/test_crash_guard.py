"""A record that kills the process is known after the third death; nobody else is blamed, and no stop is a death."""

from __future__ import annotations

import errno
import os
import signal
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from core.errors import StoreFull
from streams.ingest.validators import DEATHS, CrashGuard

POISON, NEIGHBOUR = ("t", 0, 7), ("t", 0, 8)


def die(folder: Path, how: str, *positions: tuple[str, int, int]) -> None:
    """A process that dies while it validates these records at once."""
    child = os.fork()
    if child == 0:
        with ExitStack() as stack:
            guard = CrashGuard(folder, 4)
            for position in positions:
                stack.enter_context(guard.notes.validating(position))
            os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (3 if how == "exit" else -signal.SIGKILL)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_record_at_which_the_process_died_three_times_is_poison(tmp_path: Path, how: str) -> None:
    for deaths in range(DEATHS):
        with closing(CrashGuard(tmp_path, 2)) as guard:
            assert (guard.deaths(POISON), guard.is_poison(POISON)) == (deaths, False)
        die(tmp_path, how, POISON)
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert guard.is_poison(POISON) and not guard.is_poison(NEIGHBOUR)


def test_neighbours_of_one_death_are_not_poison_and_are_forgotten_once_stored(tmp_path: Path) -> None:
    die(tmp_path, "kill", POISON, NEIGHBOUR)
    for _ in range(DEATHS - 1):  # it is validated alone from now on
        die(tmp_path, "kill", POISON)
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert (guard.deaths(POISON), guard.deaths(NEIGHBOUR)) == (DEATHS, 1)
        guard.forget([NEIGHBOUR, ("t", 0, 99)])
    with closing(CrashGuard(tmp_path, 2)) as guard:
        assert (guard.is_poison(POISON), guard.deaths(NEIGHBOUR)) == (True, 0)


def test_what_ended_well_or_raised_is_no_death(tmp_path: Path) -> None:
    with closing(CrashGuard(tmp_path, 1)) as guard:
        with guard.notes.validating(POISON):
            pass
        with pytest.raises(ValueError, match="bad"), guard.notes.validating(POISON):
            raise ValueError("bad")
    with closing(CrashGuard(tmp_path, 1)) as guard:
        assert guard.deaths(POISON) == 0


def test_a_process_that_is_stopped_while_a_record_is_validated_has_not_died_of_it(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    guard = CrashGuard(tmp_path, 1)

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
    die(tmp_path, "kill", *(("t", 0, number) for number in range(4)))
    with closing(CrashGuard(tmp_path, 1)) as guard:
        assert [guard.deaths(("t", 0, number)) for number in range(5)] == [1, 1, 1, 1, 0]
        with guard.notes.validating(POISON):
            pass


def test_a_full_disk_is_told_apart_and_loses_no_death_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(tmp_path, "kill", POISON)
    files = len(list(Path("/proc/self/fd").iterdir()))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("os.posix_fallocate", "streams.ingest.validators.replace_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            for _ in range(3):
                with pytest.raises(StoreFull, match="full"):
                    CrashGuard(tmp_path, 1)
        die(tmp_path, "kill", POISON)
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    with closing(CrashGuard(tmp_path, 1)) as guard:
        assert guard.deaths(POISON) == DEATHS
    assert not (tmp_path / "validating-1").exists()
