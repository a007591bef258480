"""A benchmark that a signal ends in the middle of starting or waiting leaves no process of its own behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import object_store
from benchmarks.stream import bare
from core.stop_signals import Stopped

POPEN = subprocess.Popen


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[Any]]:
    """Processes that were started from now on: each says that it is ready, and then stays."""
    processes: list[subprocess.Popen[Any]] = []

    def start(command: list[str], **given: Any) -> subprocess.Popen[Any]:
        idle = "import time; print('ready', flush=True); time.sleep(3600)"
        processes.append(POPEN([sys.executable, "-S", "-c", idle], **given))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


def asked_to_end(*_: Any, **__: Any) -> None:
    raise Stopped(signal.SIGTERM)


def test_the_bare_consumer_ends_with_its_benchmark(
    started: list[subprocess.Popen[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(POPEN, "communicate", asked_to_end)
    with pytest.raises(Stopped):
        bare.run_bare("127.0.0.1:1", "topic", 1, decode=True)
    assert [process.wait(60) for process in started] == [-signal.SIGKILL]


def test_an_object_store_that_is_not_up_yet_ends_with_its_benchmark(
    started: list[subprocess.Popen[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "wait_for", asked_to_end)
    with pytest.raises(Stopped), object_store.ObjectStore(tmp_path / "log.txt"):
        pass
    assert [process.wait(60) for process in started] == [-signal.SIGKILL]
