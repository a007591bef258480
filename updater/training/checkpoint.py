"""Files of an update: its checkpoint, its initial settings, and its carry-over for the next one. A checkpoint is one
safetensors file, replaced atomically, without pickle or generator states: batches are a pure function of seed and step,
so parameters, moments and the step number suffice."""

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
from core.progress import progress_log
from updater.adapters import Dense, LowRank, WeightDelta
from updater.recipes import TrainPrecision

NAME = "checkpoint.safetensors"
CARRY_OVER = "memory.safetensors"


@dataclass(frozen=True)
class Progress:
    """Progress of an update. ``run`` identifies the computation: a checkpoint of another run is ignored."""

    run: str
    step: int
    steps: int
    seconds: float
    truncated: bool = False
    budget_spent: bool = False
    losses: dict[str, list[float]] = field(default_factory=dict)
    gflops: list[float] = field(default_factory=list)
    known: list[list[Any]] = field(default_factory=list)
    excess: float = 1.0
    prepared: float = 0.0
    """GFLOPs of preparation when the budget stopped it, including that for the step not taken."""
    broken_off: float = 0.0
    """GFLOPs of an aborted step or its preparation."""


def save_checkpoint(directory: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write the checkpoint atomically. Raises DiskFull."""
    try:
        with replacing(directory / NAME) as staging:
            save_file(tensors, staging, metadata={"progress": json.dumps(asdict(progress))})
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise DiskFull(
            f"a checkpoint cannot be written to {directory}: {error}.", "Free space there; the update goes on then."
        ) from error


def load_checkpoint(directory: Path, run: str) -> tuple[dict[str, Tensor], Progress] | None:
    """The checkpoint of this run; None if it is missing, damaged, or of another run."""
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
        progress_log.info(f"checkpoint {path} cannot be read ({error}); the update starts again")
        return None


def write_json(path: Path, value: Any) -> None:
    replace_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_precision(work_dir: Path, run: str, precision: TrainPrecision) -> TrainPrecision:
    """Precision with which this run began in ``work_dir``; for a new run ``precision``, which is saved. An update
    resumed on another machine thus ends in the same result, up to rounding."""
    path = work_dir / "precision.json"
    known = read_json(path)
    if isinstance(known, dict) and known.get("run") == run and known.get("precision") in get_args(TrainPrecision):
        return known["precision"]  # type: ignore[no-any-return]
    write_json(path, {"run": run, "precision": precision})
    return precision


@dataclass(frozen=True)
class CarryOver:
    """State for the next update from the same adapter: one safetensors file in its own directory, stored under the
    adapter's name. An update from another adapter, such as after a rollback, uses that adapter's state.

    ``start``: the delta to train from, if it is not the served one. ``terms``: tensors by name. ``updates``: number of
    earlier updates, if the schedule needs it. ``merge``: memory of the merge rule.
    """

    start: WeightDelta = field(default_factory=dict)
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    merge: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
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
        """SHA-256 of the tensors, 64 hex digits; empty without tensors."""
        return digest_tensors(self.tensors) if self.tensors else ""

    def write(self, directory: Path) -> Path | None:
        if not self.tensors:
            return None
        with replacing(directory / CARRY_OVER) as staging:
            save_file(self.tensors, staging)
        return directory

    @classmethod
    def read(cls, directory: Path) -> CarryOver:
        """Raises TrainingError if it is damaged."""
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
