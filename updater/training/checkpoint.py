"""Files of an update in its work folder: its checkpoint, and what was settled when it began.

A checkpoint is one safetensors file, replaced atomically: no pickle, and no state of random generators. Batches are a
pure function of seed and step, so that parameters, moments and the number of the step are all there is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import DiskFull
from core.files import replace_file, replacing
from core.progress import say
from updater.recipes import TrainPrecision

NAME = "checkpoint.safetensors"
PRECISION = "precision.json"


@dataclass(frozen=True)
class Progress:
    """Where an update stands. ``run`` names what is computed: a checkpoint of another run is not taken."""

    run: str
    step: int
    """Steps done."""
    steps: int
    """Steps planned."""
    seconds: float
    """Wall-clock seconds spent in training, over all attempts."""
    truncated: bool = False
    """Whether the wall-clock bound ended it."""
    budget_spent: bool = False
    """Whether the next step might have cost more than was left."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    gflops: list[float] = field(default_factory=list)
    """What each step took, of all processes."""
    known: list[list[Any]] = field(default_factory=list)
    """Of steps by their sizes, see :meth:`updater.budget.bound.Costs.to_json`."""
    excess: float = 1.0
    """See :attr:`updater.budget.bound.Costs.excess`."""
    prepared: float = 0.0
    """GFLOPs of what was prepared, when the budget stopped it: also for the step that was not taken."""
    broken_off: float = 0.0
    """GFLOPs of a step, or of preparing for it, that would have exceeded the budget."""


def save_checkpoint(directory: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write the checkpoint whole or not at all. Raises DiskFull where there is no room for it."""
    try:
        with replacing(directory / NAME) as staging:
            save_file(tensors, staging, metadata={"progress": json.dumps(asdict(progress))})
    except (OSError, SafetensorError) as error:  # safetensors says so in words of its own
        raise DiskFull(
            f"a checkpoint cannot be written to {directory}: {error}.", "Free space there; the update goes on then."
        ) from error


def load_checkpoint(directory: Path, run: str) -> tuple[dict[str, Tensor], Progress] | None:
    """The checkpoint of this run, or None: there is none, it is of another run, or it is damaged."""
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values: dict[str, Any] = json.loads((file.metadata() or {})["progress"])
            progress = Progress(**values)
            if progress.run != run:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}, progress  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        say(f"checkpoint {path} cannot be read ({error}); the update starts again")
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    replace_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, or None when there is nothing or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_precision(work_dir: Path, run: str, precision: TrainPrecision) -> TrainPrecision:
    """The precision with which this run began in ``work_dir``; ``precision``, and it is kept, where it begins now.

    An update that is resumed on another machine ends in what it would have ended in on the first, up to rounding.
    """
    path = work_dir / PRECISION
    known = read_json(path)
    if isinstance(known, dict) and known.get("run") == run and known.get("precision") in get_args(TrainPrecision):
        return known["precision"]  # type: ignore[no-any-return]
    write_json(path, {"run": run, "precision": precision})
    return precision
