"""Files of an update: its checkpoint, what was settled when it began, and what it leaves for the next one.

A checkpoint is one safetensors file, replaced atomically: no pickle, and no state of random generators. Batches are a
pure function of seed and step, so that parameters, moments and the number of the step are all there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.digests import digest_tensors
from core.errors import DiskFull, TrainingError
from core.files import replace_file, replacing
from core.progress import say
from updater.adapters import Dense, LowRank, WeightDelta
from updater.recipes import TrainPrecision

NAME = "checkpoint.safetensors"
PRECISION = "precision.json"
CARRY_OVER = "memory.safetensors"


@dataclass(frozen=True)
class Progress:
    """The progress of an update. ``run`` names what is computed: a checkpoint of another run is not taken."""

    run: str
    step: int
    """Steps done."""
    steps: int
    """Steps planned."""
    seconds: float
    """Wall-clock seconds spent in training, over all attempts."""
    truncated: bool = False
    """True if the wall-clock bound ended it."""
    budget_spent: bool = False
    """True if the next step might have cost more than was left."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    gflops: list[float] = field(default_factory=list)
    """GFLOPs of each step, of all processes."""
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
    """Read what :func:`write_json` wrote; None when there is nothing or it is damaged."""
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


@dataclass(frozen=True)
class CarryOver:
    """State for the next update from the same adapter: one safetensors file in a directory of its own, kept
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
        """Read what :meth:`write` wrote. Raises TrainingError when it is damaged."""
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
