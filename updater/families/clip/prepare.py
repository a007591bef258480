"""What is computed once per sample: teacher features, and the boundary of each tower that has a frozen prefix.

Samples are handled in fixed chunks, in a fixed order. A sample's numbers then never depend on which step asked for it,
so that a resumed run works with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ops.progress import track
from serving.engines.base import ClipBase
from updater.adapters import LoraModel
from updater.families.clip.towers import SplitTower, Which
from updater.pools import Pair

CHUNK = 48
CACHE_BYTES = 4 << 30
"""Most memory for the boundaries of one tower; a tower that needs more is run from its inputs at each step."""


@dataclass
class TowerCache:
    """One tower's part. Lists are indexed by sample.

    ``teacher`` [n, dim] are the base's features. A tower in which nothing learns has its own features in ``fixed``;
    one with a prefix has its boundaries; an image tower without one has its pixels, uint8 [S, S, 3].
    """

    teacher: Tensor
    fixed: Tensor | None = None
    boundary: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


@dataclass
class Prepared:
    """Everything a step needs of every sample."""

    image: TowerCache
    text: TowerCache
    texts: list[str]


def prepare(
    base: ClipBase,
    model: LoraModel,
    towers: dict[Which, SplitTower],
    learning: dict[Which, bool],
    pairs: Sequence[Pair],
    between: Callable[[], None] = lambda: None,
) -> Prepared:
    """Run every pair through the base once. ``between`` is called after each chunk (duty cycle, signals)."""
    tokenize = base.tokenizer()
    made: dict[Which, TowerCache] = {
        which: TowerCache(torch.empty(len(pairs), base.dim)) for which in ("image", "text")
    }
    kept: dict[Which, bool] = {which: learning[which] and towers[which].cut > 0 for which in made}
    for which, cache in made.items():
        cache.fixed = None if learning[which] else torch.empty(len(pairs), base.dim)
    for start in track(range(0, len(pairs), CHUNK), "teacher features"):
        rows = pairs[start : start + CHUNK]
        pixels = [base.preprocess.pixels(pair.read()) for pair in rows]
        inputs: dict[Which, Tensor] = {
            "image": base.preprocess.normalise(np.stack(pixels), model.device),
            "text": tokenize([pair.text for pair in rows]).to(model.device),
        }
        for which, cache in made.items():
            _one_tower(model, towers[which], inputs[which], cache, start, kept[which])
            if kept[which] and start == 0:
                kept[which] = _bytes(cache.boundary) / len(rows) * len(pairs) <= CACHE_BYTES
        if learning["image"] and not kept["image"]:
            made["image"].pixels += [torch.from_numpy(image.copy()) for image in pixels]
        between()
    for which, cache in made.items():
        if not kept[which]:
            cache.boundary = []
    return Prepared(made["image"], made["text"], [pair.text for pair in pairs])


@torch.no_grad()
def _one_tower(model: LoraModel, tower: SplitTower, inputs: Tensor, cache: TowerCache, start: int, keep: bool) -> None:
    end = start + len(inputs)
    with model.base():
        if keep:
            features, boundary = tower.record(inputs)
            cache.boundary += [row.clone() for row in boundary.cpu()]
        else:
            features = tower.whole(inputs)
    cache.teacher[start:end] = features.cpu()
    if cache.fixed is not None:
        # What the incumbent changed in a tower that is locked now stays in force.
        cache.fixed[start:end] = tower.whole(inputs).cpu()
    model.restore()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stack_boundaries(rows: Sequence[Tensor], length: int | None, device: torch.device) -> Tensor:
    """Boundaries of a batch, [n, ...]; with ``length`` (texts) each cut or zero-padded to that many tokens.

    Positions beyond a text's own tokens are masked in every tower that can be trimmed, so that what they hold is
    nobody's business.
    """
    if length is None:
        return torch.stack(list(rows)).to(device)
    out = torch.zeros(len(rows), length, *rows[0].shape[1:])
    for number, row in enumerate(rows):
        used = min(length, len(row))
        out[number, :used] = row[:used]
    return out.to(device)
