"""A VLM that is killed while it starts leaves nothing that keeps the next one from starting."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.forked import ForkedProcess, import_ahead
from tests.support.tiny_vlm import tiny_vlm_base
from tests.support.vlm_starts import start_in_group

pytestmark = [pytest.mark.integration, pytest.mark.timeout(7200), pytest.mark.long]
import_ahead("vllm.v1.engine.async_llm", "tests.support.vlm_starts")
ROUNDS, AT_ONCE, ANSWERS_AFTER = 10, 2, 5
"""Starts are killed two at once. All share their caches, so each has to come as far as it is let go in what the ones
before it left; after every five rounds one has to answer."""
PLACE = re.compile(r"\[([\w/]+\.py:\d+)\]|^(started) ", re.MULTILINE)
"""Where in vLLM a line of its log comes from."""
LONGEST_DELAY = 2.0
SECONDS = 1800.0
"""For one start; beside much other work one took five minutes."""
Start = Callable[[Path | None], ForkedProcess]


def places(log: Path) -> list[str]:
    """The places that a start has passed, in the order in which it came to them."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return list(dict.fromkeys(one or two for one, two in PLACE.findall(text)))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts an engine where all caches of all starts are in one folder."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    base, shared, numbers = tiny_vlm_base(tmp_path), tmp_path / "shared", itertools.count()
    shared.mkdir()
    environment = {"HOME": str(shared), "TMPDIR": str(shared), "VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "1"}

    def start(result: Path | None) -> ForkedProcess:
        log = tmp_path / f"start-{next(numbers)}.log"
        return ForkedProcess(log, start_in_group, tmp_path, base.name, environment, result)

    return start


def answered(start: Start, result: Path) -> tuple[list[list[int]], list[str]]:
    """The answers of a start that nobody kills, and the places that it passed."""
    process = start(result)
    assert process.wait(SECONDS) == 0, process.output()
    return json.loads(result.read_text()), places(process.log)


def kill_after(processes: list[ForkedProcess], moments: list[tuple[int, float]]) -> None:
    """Kill each with its children when it has passed so many places, after a delay."""
    due: dict[int, float] = {}
    left = dict(zip(processes, moments, strict=True))
    end = time.monotonic() + SECONDS
    while left:
        assert time.monotonic() < end, [process.output() for process in left]
        for process, (passed, delay) in list(left.items()):
            assert process.poll() is None, process.output()
            if process.pid not in due and len(places(process.log)) >= passed:
                due[process.pid] = time.monotonic() + delay
            if time.monotonic() >= due.get(process.pid, end):
                os.killpg(process.pid, signal.SIGKILL)
                del left[process]
        time.sleep(0.02)
    for process in processes:
        assert process.wait(60.0) == -signal.SIGKILL


def test_a_vlm_killed_at_moments_of_its_start_starts_again_and_answers(start: Start, tmp_path: Path) -> None:
    wanted, passed = answered(start, tmp_path / "first.json")
    assert len(passed) > 2 * ROUNDS, "vLLM's log tells where it is"
    chance = random.Random(0)
    count = ROUNDS * AT_ONCE
    moments = [(1 + i * len(passed) // count, chance.uniform(0, LONGEST_DELAY)) for i in range(count)]
    chance.shuffle(moments)
    for number in range(ROUNDS):
        chosen = moments[number * AT_ONCE : (number + 1) * AT_ONCE]
        processes = [start(None) for _ in chosen]
        kill_after(processes, chosen)
        alive = [one for one in psutil.process_iter(["pid"]) if _group(one.pid) in {each.pid for each in processes}]
        psutil.wait_procs(alive, 60.0)
        if (number + 1) % ANSWERS_AFTER == 0:
            again, _ = answered(start, tmp_path / f"again-{number}.json")
            assert again == wanted, chosen


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
