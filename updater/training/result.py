"""Limits and results of an update."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from updater.recipes import Part

NAMED = 20
"""Left-out samples that the ledger names; the log names all."""


@dataclass(frozen=True)
class Limits:
    gflops: float
    """Memory-adjusted GFLOPs, never exceeded; the number of planned steps follows from them."""
    seconds: float
    """Wall-clock bound, a safety net: a run that it ends is marked ``truncated``, and is not reproducible."""
    threads: int = 2
    duty_cycle: float = 1.0
    """Share of time spent computing; the trainer sleeps for the rest, between steps."""
    checkpoint_steps: int = 10
    work_bytes: float = 16 * 2**30


@dataclass(frozen=True)
class TrainResult:
    adapter: str
    directory: Path
    steps: int
    planned_steps: int
    maf: float
    """Memory-adjusted GFLOPs spent, counted operation by operation, including teacher passes."""
    maf_planned: float
    seconds: float
    truncated: bool
    budget_spent: bool
    """True if it ended before the planned steps because the next one might have exceeded the budget."""
    losses: dict[str, list[float]]
    """Every term at every step, unweighted, and ``loss``, their weighted sum."""
    cost: dict[str, Any]
    samples: dict[Part, int]
    pending: int
    visited: int
    """New samples that were in a batch; the others were passed over."""
    left_out: dict[str, str]
    carry_over: Path | None = None


@dataclass(frozen=True)
class Estimate:
    steps: int
    gflops: float
    seconds: float
    visited: int
    sample_gflops: float


def cost_of(result: TrainResult) -> dict[str, Any]:
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
