"""The real trainer process facing a backlog: its memory, its first step, and the results of its updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.process_memory import child_processes
from benchmarks.trainer import BusyTrainer
from core.child_process import tail
from core.errors import RatchetError
from core.ledger import Ledger, UpdateRow
from core.ledger.learning import FINISHED
from core.settings import Settings

POLL_SECONDS = 0.25


@dataclass
class Watched:
    memory: int = 0
    """Peak memory of the trainer and its children in bytes: their own pages, without those of files."""
    first_step_seconds: float = 0.0
    """From the start of the process to its first step."""
    updates: list[UpdateRow] = field(default_factory=list)
    restarts: int = 0
    """Number of times that the process ended by itself; it is not started again."""


def watch(
    settings: Settings, file: Path, updates: int, seconds: float, between: Callable[[UpdateRow], None]
) -> Watched:
    """Run ``ratchet trainer`` until this many updates are finished.

    Args:
        file: where the settings are written for the process.
        seconds: longest time for one update.
        between: called with each finished update, to add data for the next one.

    Raises RatchetError if an update did not end in time.
    """
    trainer = BusyTrainer(settings, file)
    part = trainer.part
    ledger, seen = Ledger.open(settings.ledger), Watched()
    part.start()
    began = last = time.monotonic()
    try:
        while len(seen.updates) < updates:
            seen.memory = max(seen.memory, sum(each.size for each in child_processes().values()))
            if not seen.first_step_seconds and trainer.steps() > 0:
                seen.first_step_seconds = time.monotonic() - began
            known = {each.id for each in seen.updates}
            for update in reversed(ledger.updates()):
                if update.id not in known and update.state in FINISHED:
                    seen.updates.append(update)
                    between(update)
                    last = time.monotonic()
            if not part.running:
                seen.restarts += 1
                break
            if time.monotonic() - last > seconds:
                raise RatchetError(f"no update ended for {seconds:.0f} s:\n{tail(part.log)}", f"See {part.log}.")
            time.sleep(POLL_SECONDS)
        return seen
    finally:
        trainer.stop()
        ledger.close()
