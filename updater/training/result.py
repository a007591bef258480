"""Limits and results of an update."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updater.recipes import Part

NAMED = 20
"""Samples that were left out which the ledger names; the log names all."""


@dataclass(frozen=True)
class Limits:
    """Resources that one update may use."""

    gflops: float
    """Memory-adjusted GFLOPs, which no update exceeds; the number of planned steps follows from them."""
    seconds: float
    """Wall-clock bound, a safety net: a run that it ends is marked ``truncated``, and is not reproducible."""
    threads: int = 2
    duty_cycle: float = 1.0
    """Share of time spent computing; the rest of the time the trainer sleeps between steps."""
    checkpoint_steps: int = 10
    work_bytes: float = 16 * 2**30
    """Disk for what is computed once per sample."""


@dataclass(frozen=True)
class TrainResult:
    """The result of an update."""

    adapter: str
    directory: Path
    steps: int
    planned_steps: int
    maf: float
    """Memory-adjusted GFLOPs spent, counted operation by operation, teacher passes included."""
    maf_planned: float
    seconds: float
    truncated: bool
    budget_spent: bool
    """True if it ended before the planned steps, since the next one might have cost more than was left."""
    losses: dict[str, list[float]]
    """Every term at every step, unweighted, and ``loss``, their weighted sum."""
    cost: dict[str, Any]
    samples: dict[Part, int]
    """Examples of each pool that the planned steps visit; one counts once for each of its views."""
    pending: int
    """New samples in all, of which some were drawn."""
    visited: int
    """New samples that were in a batch; the others were passed over."""
    left_out: dict[str, str]
    """Reasons by the ids of samples, of those that steps visited, that could not be prepared."""
    carry_over: Path | None = None
    """Directory with what the next update from this adapter wants to know, if there is something."""


@dataclass(frozen=True)
class Estimate:
    """The estimated result of a training run, by one measured batch."""

    steps: int
    """That the budget pays for, at most those of the recipe."""
    gflops: float
    """Memory-adjusted GFLOPs of these steps, and of what is prepared for them."""
    seconds: float
    """On this machine as busy as it is now, without pauses for others."""
    visited: int
    """New samples that these steps visit."""
    sample_gflops: float
    """Forward pass of one sample through the whole model."""


def cost_of(result: TrainResult) -> dict[str, Any]:
    """The cost of a training run, as the ledger and the report have it."""
    return {
        "gflops_planned": result.maf_planned,
        "gflops_spent": result.maf,
        "seconds": result.seconds,
        "steps": result.steps,
        "steps_planned": result.planned_steps,
        "truncated": result.truncated,
        "budget_spent": result.budget_spent,
        "loss_first": result.losses["loss"][0],
        "loss_last": result.losses["loss"][-1],
        "pending": result.pending,
        "visited": result.visited,
        "passed_over": result.pending - result.visited,
        "left_out": len(result.left_out),
        "left_out_samples": dict(sorted(result.left_out.items())[:NAMED]),
        "samples": sum(result.samples.values()),
        **{f"samples_{part}": count for part, count in result.samples.items()},
        **result.cost,
    }
