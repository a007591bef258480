"""The faults of a run with their times, drawn from a seed, so that the run can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FaultKind = Literal["kill", "stop", "cut", "full"]
WORKER_GAP, MAINTAIN_GAP = 14.0, 30.0
"""Average seconds between two faults of a process."""
BROKER_CUTS, DISK_FILLS = 8, 4
FIRST = 5.0
"""Workers have joined by then."""
_SECONDS: dict[FaultKind, tuple[float, float]] = {
    "kill": (0.5, 5.0),  # until it is started again
    "stop": (1.0, 20.0),  # SIGSTOP; a member that is silent for 6 s is removed from the group
    "cut": (1.0, 12.0),
    "full": (3.0, 12.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that is repaired after a while."""

    at: float
    """Seconds since the beginning."""
    target: str
    """``worker 0``, ``worker 1``, ``maintain``, ``broker`` or ``disk``."""
    kind: FaultKind
    seconds: float

    def __str__(self) -> str:
        return f"{self.at:6.1f} s  {self.target}: {self.kind} for {self.seconds:.1f} s"


def plan(seconds: float, seed: int, targets: Sequence[str]) -> list[Fault]:
    """The faults of a run, in order. Those of one target do not overlap; those of different ones do."""
    faults = []
    for number, target in enumerate(targets):
        generator = np.random.default_rng([seed, number])
        gap = _gap(target, seconds)
        at = FIRST + generator.uniform(0.2, 1.0) * gap
        while True:
            kind = _kind(target, generator)
            length = float(generator.uniform(*_SECONDS[kind]))
            if at + length > seconds:
                break
            faults.append(Fault(round(float(at), 1), target, kind, round(length, 1)))
            at += length + max(1.0, generator.exponential(gap))
    return sorted(faults, key=lambda fault: fault.at)


def _gap(target: str, seconds: float) -> float:
    if target == "broker":
        return seconds / (BROKER_CUTS + 1)
    if target == "disk":
        return seconds / (DISK_FILLS + 1)
    return MAINTAIN_GAP if target == "maintain" else WORKER_GAP


def _kind(target: str, generator: np.random.Generator) -> FaultKind:
    if target == "broker":
        return "cut"
    if target == "disk":
        return "full"
    return "kill" if generator.random() < 0.5 else "stop"
