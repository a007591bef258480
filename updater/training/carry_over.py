"""What an update leaves for the next one, beside the adapter: where to start from, what terms of the loss remember.

One safetensors file in a directory of its own, kept under the adapter's name: an update that starts from another
adapter, after a rollback say, finds that one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.digests import digest_tensors
from core.errors import TrainingError
from core.files import replacing
from updater.adapters import Dense, LowRank, WeightDelta

NAME = "memory.safetensors"


@dataclass(frozen=True)
class CarryOver:
    """``start``: the delta to train from, where that is not what is served. ``terms``: tensors by name.

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
        with replacing(directory / NAME) as staging:
            save_file(self.tensors, staging)
        return directory

    @classmethod
    def read(cls, directory: Path) -> CarryOver:
        """What :meth:`write` wrote. Raises TrainingError when it is damaged."""
        try:
            tensors = load_file(directory / NAME)
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
