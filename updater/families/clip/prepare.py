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
from serving.engines.conv_layout import images_per_pass
from updater.adapters import AdapterModel
from updater.families.clip.towers import SplitTower, Which
from updater.pools import Pair

CHUNK = 48
CACHE_BYTES = 4 << 30
"""Most memory for the boundaries of one tower; a tower that needs more is run from its inputs at each step."""


@dataclass
class TowerCache:
    """One tower's part. Lists are indexed by sample.

    ``teachers`` [n, dim] are features of each teacher. A tower in which nothing learns has its own features in
    ``fixed``; one with a prefix has its boundaries; an image tower without one has its pixels, uint8 [S, S, 3].
    """

    teachers: dict[str, Tensor] = field(default_factory=dict)
    fixed: Tensor | None = None
    boundary: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


@dataclass
class Filler:
    """Fills the cache of one tower, chunk by chunk, with the model at its start."""

    model: AdapterModel
    tower: SplitTower
    count: int
    dim: int
    learns: bool
    teachers: Sequence[str]
    cache: TowerCache = field(default_factory=TowerCache)

    def __post_init__(self) -> None:
        self.keep = self.learns and self.tower.cut > 0
        self.cache.teachers = {name: torch.empty(self.count, self.dim) for name in self.teachers}
        self.cache.fixed = None if self.learns else torch.empty(self.count, self.dim)

    @torch.no_grad()
    def take(self, inputs: Tensor, start: int) -> None:
        """Normalised pixels or token ids of the samples from number ``start`` on."""
        end, boundary = start + len(inputs), None
        if self.keep or "base" in self.teachers:
            with self.model.base():
                features, boundary = self._whole(inputs)
            if "base" in self.teachers:
                self.cache.teachers["base"][start:end] = features
        if self.cache.fixed is not None or "incumbent" in self.teachers:
            # What the incumbent changed in a locked tower stays in force; below the boundary it changed nothing.
            features = (self.tower.whole(inputs) if boundary is None else self._resumed(boundary, inputs)).cpu()
            if self.cache.fixed is not None:
                self.cache.fixed[start:end] = features
            if "incumbent" in self.teachers:
                self.cache.teachers["incumbent"][start:end] = features
        self.model.restore()
        if self.keep and start == 0:
            self.keep = _bytes(self.cache.boundary) / len(inputs) * self.count <= CACHE_BYTES
            self.cache.boundary = self.cache.boundary if self.keep else []

    def _whole(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.keep:
            return self.tower.whole(inputs).cpu(), None
        features, boundary = self.tower.record(inputs)
        self.cache.boundary += [row.clone() for row in boundary.cpu()]
        return features.cpu(), boundary

    def _resumed(self, boundary: Tensor, inputs: Tensor) -> Tensor:
        return self.tower.resume(boundary, inputs[:1] if self.tower.which == "image" else inputs)


@dataclass
class Prepared:
    """Everything a step needs of every sample."""

    image: TowerCache
    text: TowerCache
    texts: list[str]


def prepare(
    base: ClipBase,
    model: AdapterModel,
    towers: dict[Which, SplitTower],
    learning: dict[Which, bool],
    pairs: Sequence[Pair],
    teachers: Sequence[str] = ("base",),
    between: Callable[[], None] = lambda: None,
) -> Prepared:
    """Run every pair through base and teachers once. ``between`` is called after each chunk (duty cycle, signals)."""
    tokenize = base.tokenizer()
    few = images_per_pass(model.model.get_submodule("visual"), model.device)
    fillers: dict[Which, Filler] = {
        which: Filler(model, towers[which], len(pairs), base.dim, learning[which], teachers)
        for which in ("image", "text")
    }
    for start in track(range(0, len(pairs), CHUNK), "teacher features"):
        rows = pairs[start : start + CHUNK]
        pixels = [base.preprocess.pixels(pair.read()) for pair in rows]
        for first in range(0, len(rows), few):
            some = np.stack(pixels[first : first + few])
            fillers["image"].take(base.preprocess.normalise(some, model.device), start + first)
        fillers["text"].take(tokenize([pair.text for pair in rows]).to(model.device), start)
        if learning["image"] and not fillers["image"].keep:
            fillers["image"].cache.pixels += [torch.from_numpy(image.copy()) for image in pixels]
        between()
    return Prepared(fillers["image"].cache, fillers["text"].cache, [pair.text for pair in pairs])


def prepare_texts(
    base: ClipBase, model: AdapterModel, tower: SplitTower, learns: bool, texts: Sequence[str], teachers: Sequence[str]
) -> TowerCache:
    """The same for texts alone."""
    tokenize = base.tokenizer()
    filler = Filler(model, tower, len(texts), base.dim, learns, teachers)
    for start in range(0, len(texts), CHUNK):
        filler.take(tokenize(list(texts[start : start + CHUNK])).to(model.device), start)
    return filler.cache


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
