"""What the soak says of memory, and when it fails."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import soak
from benchmarks.bench_home import bench_home, clip_base
from benchmarks.process_memory import ProcessMemory
from benchmarks.soak import MemoryLog, violations
from core.errors import ConfigError
from core.loading import load_settings
from core.settings import Settings
from demo.load.probes import batch_probes
from tests.support.inputs import pictures
from tests.support.tiny import tiny_base


def log_of(sizes: dict[int, list[int]]) -> MemoryLog:
    """A snapshot each 20 s, sizes in MiB; 0 is a process that is not there."""
    log = MemoryLog()
    for number in range(len(next(iter(sizes.values())))):
        there = {pid: row[number] << 20 for pid, row in sizes.items() if row[number]}
        log.add(20.0 * number, {pid: ProcessMemory("p", size) for pid, size in there.items()})
    return log


def test_growth_counts_from_the_warm_up_on_and_follows_the_trend() -> None:
    """Not what one snapshot shows: nine in ten are as they were, though the last of all has nine times as much."""
    steady, growing = [10, 50, *[100] * 9, 900], [10, 50, *range(100, 110)]
    assert log_of({1: steady, 2: growing}).growth(warm_seconds=40) == {"p 2": 1.09, "p 1": 1.0}


def test_a_process_that_ended_after_the_warm_up_is_named() -> None:
    log = log_of({1: [50, 50, 50, 50], 2: [50, 50, 50, 0], 3: [50, 0, 0, 0], 4: [0, 0, 0, 50]})
    assert log.ended(warm_seconds=20) == ["p 2"]
    assert log.growth(warm_seconds=20) == {"p 1": 1.0}


def test_a_process_that_became_small_has_not_ended() -> None:
    """A raylet of 16 MiB had a page less in the last snapshot, and was said to have ended."""
    assert log_of({1: [17, 17, 17, 15]}).ended(warm_seconds=20) == []


def test_a_small_process_neither_grows_nor_ends() -> None:
    log = log_of({1: [5, 5, 5, 9], 2: [5, 5, 5, 0]})
    assert (log.growth(warm_seconds=20), log.ended(warm_seconds=20)) == ({}, [])


def test_a_snapshot_is_the_lowest_reading_of_those_that_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{1: 900, 2: 50, 3: 7}, {1: 800, 2: 60, 3: 7}, {1: 850, 2: 70, 4: 9, 5: 1}])
    clock = count(1)
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    monkeypatch.setattr(soak, "session_pids", lambda settings: [1, 2, 3, 4])
    monkeypatch.setattr(
        soak, "child_processes", lambda root: {pid: ProcessMemory("p", size) for pid, size in next(readings).items()}
    )
    lowest = soak.lowest_memory(Settings(), until=3)
    assert {pid: memory.size for pid, memory in lowest.items()} == {1: 800, 2: 50, 4: 9}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [({}, []), ({"failed": 1}, ["failed 1"]), ({"mixed": 2}, ["mixed 2"]),
     ({"memory_growth": 1.02}, ["memory_growth 1.02"]), ({"memory_growth": None}, ["memory_growth None"])],
)  # fmt: skip
def test_a_run_fails_by_what_grew_failed_or_mixed(changed: dict[str, object], wrong: list[str]) -> None:
    assert violations({"failed": 0, "mixed": 0, "processes_ended": [], "memory_growth": 1.019} | changed) == wrong


def test_a_batch_asks_for_images_and_for_texts_in_one_request_each() -> None:
    images, texts = batch_probes(pictures(3), ["a", "b"], 4)
    assert (images.items, texts.items) == ((0, 1, 2, 0), (3, 4, 3, 4))
    assert texts.body["input"] == ["a", "b", "a", "b"] and len(images.body["input"]) == 4


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tiny_base(tmp_path / "home")
    return load_settings(overrides={"home": tmp_path / "home", "base.clip": "tiny", "base.vlm": ""}, environ={})


def test_a_home_of_a_run_has_the_base_and_no_guard(settings: Settings, tmp_path: Path) -> None:
    ours = bench_home(settings, tmp_path / "run", clip_base(settings, "tiny"), encoder_replicas=3)
    assert clip_base(ours, "tiny").digest == clip_base(settings, "tiny").digest
    assert (ours.home, ours.serve.encoder_replicas, ours.rollout.guard_seconds) == (tmp_path / "run", 3, 0)
    assert settings.rollout.guard_seconds > 0


def test_a_base_that_is_neither_registered_nor_an_architecture_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="no base 'ViT-Z'"):
        clip_base(settings, "ViT-Z")
