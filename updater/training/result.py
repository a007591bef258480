"""What one update may use, what it came to, and what it leaves for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.digests import digest_tensors
from core.errors import TrainingError
from core.files import replacing
from updater.adapters import Dense, LowRank, WeightDelta
from updater.recipes import Part

CARRY_OVER = "memory.safetensors"
NAMED = 20
"""Samples that were left out which the ledger names; the log names all."""


@dataclass(frozen=True)
class Limits:
    """What one update may use."""

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
    """What an update came to."""

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
    """Whether it ended before the planned steps, since the next one might have cost more than was left."""
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
    """What a training run would come to, by one measured batch."""

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
    """What the ledger and the report tell of a training run."""
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


@dataclass(frozen=True)
class CarryOver:
    """What the next update from the same adapter wants to know: one safetensors file in a directory of its own, kept
    under the adapter's name. An update that starts from another adapter, after a rollback say, finds that one's.

    ``start``: the delta to train from, where that is not what is served. ``terms``: tensors by name.

    ``updates``: how many came before, where the schedule looks at that. ``merge``: what the merge rule remembers.
    """

    start: WeightDelta = field(default_factory=dict)
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    merge: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        tensors = {f"term/{name}": value for name, value in self.terms.items()}
        tensors |= {f"merge/{name}": value for name, value in self.merge.items()}
        if self.updates:
            tensors["updates"] = torch.tensor(self.updates)
        for name, part in self.start.items():
            if isinstance(part, LowRank):
                tensors |= {f"start/{name}/a": part.a, f"start/{name}/b": part.b}
            else:
                tensors[f"start/{name}/whole"] = part.value
        return {name: value.contiguous().clone() for name, value in tensors.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors, 64 hex digits; of nothing, the empty text."""
        return digest_tensors(self.tensors) if self.tensors else ""

    def write(self, directory: Path) -> Path | None:
        """Write it, and return the directory; None when there is nothing to remember."""
        if not self.tensors:
            return None
        with replacing(directory / CARRY_OVER) as staging:
            save_file(self.tensors, staging)
        return directory

    @classmethod
    def read(cls, directory: Path) -> CarryOver:
        """What :meth:`write` wrote. Raises TrainingError when it is damaged."""
        try:
            tensors = load_file(directory / CARRY_OVER)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the memory of the last update in {directory} cannot be read: {error}.",
                "Delete it: the update then starts from the adapter alone.",
            ) from None
        terms, merge = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("term/", "merge/")
        )
        start: dict[str, LowRank | Dense] = {}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            name, _, side = rest.rpartition("/")
            if kind == "start" and side == "whole":
                start[name] = Dense(value)
            elif kind == "start" and side == "a":
                start[name] = LowRank(value, tensors[f"start/{name}/b"])
        return cls(start, terms, int(tensors.get("updates", 0)), merge)
