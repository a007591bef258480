"""A trainer process that ends itself with SIGKILL at a chosen point."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.artifacts import Artifacts
from core.ledger import Ledger
from tests.integration.updater.home import make_home, make_vlm_home
from tests.support.forked import ForkedProcess, import_ahead
from tests.support.sudden_death import die
from updater.service import gate_update
from updater.service.update_loop import UpdaterService, run_update
from updater.step.learner import Learner

import_ahead(__name__)
backward, put_directory, advance_update = Learner.forward_backward, Artifacts.put_directory, Ledger.advance_update
SLOW_STEP_SECONDS = 0.3


def die_at_step(number: int) -> Callable[..., Any]:
    """``Learner.forward_backward``, but the process dies in this training step."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 + number:  # the cost probe is the first
            die()
        return backward(*args)

    return call


def slow_step(*args: Any) -> Any:
    """``Learner.forward_backward``, slow enough to send a signal."""
    time.sleep(SLOW_STEP_SECONDS)
    return backward(*args)


def put_all_but_memories(self: Artifacts, source: Path, key: str) -> None:
    """``Artifacts.put_directory``, but the process dies before it stores a memory."""
    if key.startswith("memories/"):
        die()
    put_directory(self, source, key)


def advance_until_trained(self: Ledger, update_id: str, state: Any = None, **values: Any) -> Any:
    """``Ledger.advance_update``, but the process dies before an update is marked as trained."""
    if state == "trained":
        die()
    return advance_update(self, update_id, state, **values)


#: Where it dies, or is slow: name -> object, attribute and what takes its place.
POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "in the middle of training": (Learner, "forward_backward", die_at_step(4)),
    "before the adapter is stored": (Artifacts, "put_directory", die),
    "between the adapter and the ledger": (Ledger, "register_adapter", die),
    "between the adapter's row and the update's": (Ledger, "advance_update", advance_until_trained),
    "in the gate": (gate_update, "run_gate", die),
    "between verdict and proposal": (UpdaterService, "_propose", die),
    "before the memory is stored": (Artifacts, "put_directory", put_all_but_memories),
    "nowhere, but slowly": (Learner, "forward_backward", slow_step),
}


def start(home: Path, point: str = "", vlm: bool = False) -> ForkedProcess:
    """Start one update in a new process. ``point``: one of :data:`POINTS`, or empty."""
    return ForkedProcess(home.with_suffix(".log"), run, home, point, vlm)


def run(home: Path, point: str, vlm: bool) -> None:
    if point:
        setattr(*POINTS[point])
    run_update(make_vlm_home(home) if vlm else make_home(home), once=True)
