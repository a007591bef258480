"""A trainer process that ends itself with SIGKILL at a chosen point."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from core.artifacts import Artifacts
from core.ledger import Ledger
from tests.integration.updater.home import make_home, make_vlm_home
from tests.support.forked import ForkedProcess, import_ahead
from tests.support.sudden_death import interrupt
from updater.service import gate_update
from updater.service.update_loop import UpdaterService, run_update
from updater.step.learner import Learner

import_ahead(__name__)
SECONDS = 400.0
"""For what takes five alone."""
backward = Learner.forward_backward


def slow_step(*args: Any) -> Any:
    """``Learner.forward_backward``, slow enough to send a signal."""
    time.sleep(0.3)
    return backward(*args)


#: What lets it die, or makes it slow.
POINTS: dict[str, Callable[[], object]] = {
    "nowhere": lambda: None,
    "in the middle of training": partial(interrupt, Learner, "forward_backward", call=5),  # the first is a cost probe
    "before the adapter is stored": partial(interrupt, Artifacts, "put_directory"),
    "between the adapter and the ledger": partial(interrupt, Ledger, "register_adapter"),
    "between the adapter's row and the update's": partial(
        interrupt, Ledger, "advance_update", when=lambda self, update, state=None, **_: state == "trained"
    ),
    "in the gate": partial(interrupt, gate_update, "run_gate"),
    "between verdict and proposal": partial(interrupt, UpdaterService, "_propose"),
    "before the memory is stored": partial(
        interrupt, Artifacts, "put_directory", when=lambda self, source, key: key.startswith("memories/")
    ),
    "nowhere, but slowly": partial(setattr, Learner, "forward_backward", slow_step),
}


def start(home: Path, point: str = "nowhere", vlm: bool = False) -> ForkedProcess:
    """Start one update in a new process, which ends at one of :data:`POINTS`."""
    return ForkedProcess(home.with_suffix(".log"), run, home, point, vlm)


def run(home: Path, point: str, vlm: bool) -> None:
    POINTS[point]()
    run_update(make_vlm_home(home) if vlm else make_home(home), once=True)
