from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core import child_process
from core.child_process import ChildProcess, tail
from core.waiting import wait_until
from ops.cli.context import Context
from ops.cli.supervisor import Supervisor


def _wait(condition: Callable[[], object]) -> None:
    assert wait_until(condition, 10.0, pause=0.02), "nothing happened"


def test_a_part_that_dies_is_started_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "BACKOFF_SECONDS", (0.2,))
    part = ChildProcess(
        "part", [sys.executable, "-c", "print('hello', flush=True); raise SystemExit(3)"], tmp_path / "log"
    )
    part.start()
    _wait(lambda: not part.running)
    part.restart_dead(time.monotonic())
    assert part.restarts == 0
    _wait(lambda: part.restart_dead(time.monotonic()) or part.restarts == 1)
    part.stop(time.monotonic() + 5)
    assert not part.running
    assert tail(part.log).count("hello") >= 1


def test_up_starts_the_console_last_and_can_leave_it_out(tmp_path: Path) -> None:
    context = Context(None, [f"home={tmp_path}", "kafka.bootstrap=127.0.0.1:1"])
    names = list(Supervisor.ORDER)
    assert [part.name for part in Supervisor(context, names).parts][-1] == "console"
    assert Supervisor(context, names).part("console").command[-1] == "console"
    assert Supervisor(context, names).part("maintain").command[-1] == "maintain"
    assert "console" not in [part.name for part in Supervisor(context, names[:-1]).parts]
