"""The two towers of a CLIP as *prefix* and *suffix*. With adapters in the last blocks only, the output of the blocks
below (the *boundary*) is the same at every step. It is kept per sample; steps and autograd start there. A sample's
numbers depend on the samples that pass the model with it: those of its shard, in fixed passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from updater.adapters import AdapterModel
from updater.adapters.trained_layers import Which, tower_blocks
from updater.recipes import TrainPrecision
from updater.step.passes import computing
from updater.step.shards import Values


class SplitTower:
    """A tower that can start at its boundary. ``cut`` blocks form the prefix; 0 for none."""

    def __init__(self, model: nn.Module, which: Which, cut: int, precision: TrainPrecision = "float32") -> None:
        self.model = cast(Any, model)
        self.precision: TrainPrecision = precision
        self.which = which
        self.cut = cut
        self._prefix: list[_Skippable] = []
        if cut:
            blocks = cast(Any, model.get_submodule(tower_blocks(model, which)[0]))
            for number in range(cut):
                blocks[number] = _Skippable(blocks[number], last=number == cut - 1)
                self._prefix.append(blocks[number])

    def whole(self, inputs: Tensor) -> Tensor:
        """Features, float32 [n, dim] of unit length, from normalised pixels or token ids."""
        encode = self.model.encode_image if self.which == "image" else self.model.encode_text
        with computing(self.precision, inputs.device):
            features = encode(inputs)
        return F.normalize(features.float(), dim=-1)

    def record(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.whole(inputs)
        return features, self._prefix[-1].output

    def resume(self, boundary: Tensor, inputs: Tensor) -> Tensor:
        """Features from the boundary on. ``inputs``: token ids; for images any single picture [1, 3, S, S]. The stem
        still runs on ``inputs`` and its result is discarded: texts need the ids for masks and pooling, and one picture
        costs nothing."""
        for block in self._prefix:
            block.skip = True
        self._prefix[-1].replacement = boundary
        try:
            return self.whole(inputs)
        finally:
            for block in self._prefix:
                block.skip = False
            self._prefix[-1].replacement = None


class _Skippable(nn.Module):
    """Block of the prefix: runs, or passes its input on. The last one stores its output, or passes on a replacement."""

    def __init__(self, inner: nn.Module, last: bool) -> None:
        super().__init__()
        self.inner = inner
        self.last = last
        self.skip = False
        self.output: Tensor = torch.empty(0)
        self.replacement: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.skip:
            return x if self.replacement is None else self.replacement
        output: Tensor = self.inner(x, *args, **kwargs)
        if self.last:
            self.output = output
        return output

    def get_weight_dtype(self) -> torch.dtype:
        return cast(torch.dtype, cast(Any, self.inner).get_weight_dtype())


@dataclass
class TowerPass:
    """One tower, run once over each sample. Values by name: features [dim] of each teacher; ``fixed``, features of a
    tower that does not learn; ``boundary`` if kept."""

    model: AdapterModel
    tower: SplitTower
    learns: bool
    keep: bool = False
    """True for a tower that learns and has a prefix, if there is room for boundaries."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor, teachers: Sequence[str]) -> Values:
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
            # The incumbent's changes to a locked tower stay active; below the boundary there are none.
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
        return int(row.nbytes * grown)

    def _resumed(self, boundary: Tensor, inputs: Tensor) -> Tensor:
        return self.tower.resume(boundary, inputs[:1] if self.tower.which == "image" else inputs)


def stack_boundaries(rows: Sequence[Tensor], length: int | None, device: torch.device) -> Tensor:
    """Boundaries of a batch, [n, ...]; with ``length`` (texts) each cut or zero-padded to that many tokens. Positions
    beyond a text's own tokens are masked in every tower that can be trimmed, so their values do not matter."""
    if length is None:
        return torch.stack(list(rows)).to(device)
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for number, row in enumerate(rows):
        used = min(length, len(row))
        out[number, :used] = row[:used]
    return out.to(device)
