"""What is computed once per sample: teacher features, and the boundary of each tower that has a frozen prefix.

A sample's numbers depend on the samples that go through the model with it: those of its shard, in fixed passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from updater.adapters import AdapterModel
from updater.families.clip.towers import SplitTower
from updater.step.shards import Values


@dataclass
class TowerPass:
    """One tower, run once over each sample.

    Its values by name: features [dim] of each teacher under the teacher's name; ``fixed``, features of a tower in which
    nothing learns; ``boundary`` where it is kept.
    """

    model: AdapterModel
    tower: SplitTower
    learns: bool
    keep: bool = False
    """Whether boundaries are kept: for a tower that learns and has a prefix, where there is room for them."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor, teachers: Sequence[str]) -> Values:
        """Values of some normalised pixels or token ids, with the model at its start, for those teachers."""
        values: dict[str, Sequence[Tensor]] = {}
        boundary: Tensor | None = None
        if self.keep or "base" in teachers:
            with self.model.base():
                features, boundary = self.tower.record(inputs) if self.keep else (self.tower.whole(inputs), None)
            if boundary is not None:
                values["boundary"] = list(boundary.cpu())
            if "base" in teachers:
                values["base"] = list(features.cpu())
        if not self.learns or "incumbent" in teachers:
            # What the incumbent changed in a locked tower stays in force; below the boundary it changed nothing.
            features = (self.tower.whole(inputs) if boundary is None else self._resumed(boundary, inputs)).cpu()
            if not self.learns:
                values["fixed"] = list(features)
            if "incumbent" in teachers:
                values["incumbent"] = list(features)
        self.model.restore()
        return values

    def boundary_bytes(self, inputs: Tensor, length: int) -> int:
        """Bytes of the boundary of one sample; of a text with ``length`` tokens."""
        if not self.learns or not self.tower.cut:
            return 0
        with torch.no_grad(), self.model.base():
            _, boundary = self.tower.record(inputs)
        self.model.restore()
        row = boundary[0]
        grown = length / len(row) if self.tower.which == "text" else 1.0
        return int(row.numel() * row.element_size() * grown)

    def _resumed(self, boundary: Tensor, inputs: Tensor) -> Tensor:
        return self.tower.resume(boundary, inputs[:1] if self.tower.which == "image" else inputs)


def stack_boundaries(rows: Sequence[Tensor], length: int | None, device: torch.device) -> Tensor:
    """Boundaries of a batch, [n, ...]; with ``length`` (texts) each cut or zero-padded to that many tokens.

    Positions beyond a text's own tokens are masked in every tower that can be trimmed, so that what they hold is
    nobody's business.
    """
    if length is None:
        return torch.stack(list(rows)).to(device)
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for number, row in enumerate(rows):
        used = min(length, len(row))
        out[number, :used] = row[:used]
    return out.to(device)
