"""The learner of a CLIP: two towers, compared with each other and with their teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from serving.engines.base import ClipBase
from updater.adapters import Delta, LoraModel
from updater.families.clip.prepare import prepare, stack_boundaries
from updater.families.clip.towers import SplitTower, Which, first_touched, trained_modules
from updater.learner import Learner
from updater.objectives import Features
from updater.pools import Pair, caption_numbers
from updater.recipes import Part, Recipe

WHICH: tuple[Which, Which] = ("image", "text")


class ClipLearner(Learner[Pair]):
    """Steps start at each tower's boundary: what no adapter touches is computed once per pair."""

    base: ClipBase

    def __init__(self, base: ClipBase, recipe: Recipe, start: Delta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        trained = trained_modules(base, plain, recipe)
        super().__init__(base, recipe, LoraModel(base, trained, recipe.rank, recipe.alpha, start, seed, device))
        touched = self.model.base_names
        self.learning: dict[Which, bool] = {
            which: any(name.startswith("visual.") == (which == "image") for name in trained) for which in WHICH
        }
        self.towers = {
            which: SplitTower(self.model.model, which, first_touched(touched, plain, which)) for which in WHICH
        }
        self.scale = 1 / recipe.temperature if recipe.temperature else float(plain.logit_scale.exp())  # type: ignore[operator]
        self._tokenize = base.tokenizer()
        self._blank = torch.zeros(1, 3, base.preprocess.size, base.preprocess.size, device=self.model.device)

    def prepare(
        self, examples: Sequence[Pair], parts: Sequence[Part], between: Callable[[], None] = lambda: None
    ) -> None:
        self.made = prepare(self.base, self.model, self.towers, self.learning, examples, between)
        numbers = caption_numbers(examples)
        self.parts = list(parts)
        self.lengths = [self._tokenize([pair.text]).shape[1] for pair in examples]
        self.captions = torch.tensor([numbers[pair.text.strip().lower()] for pair in examples])

    def length(self, row: int) -> int:
        return self.lengths[row]

    def batch(self, rows: Sequence[int]) -> Features:
        index = torch.tensor(rows)
        device = self.model.device
        return Features(
            part=tuple(self.parts[row] for row in rows),
            image=self.features("image", rows),
            text=self.features("text", rows),
            teacher_image=self.made.image.teacher[index].to(device),
            teacher_text=self.made.text.teacher[index].to(device),
            caption=self.captions[index].to(device),
            scale=self.scale,
        )

    def features(self, which: Which, rows: Sequence[int]) -> Tensor:
        """Student features [n, dim] of unit length, from as far up the tower as possible."""
        cache = self.made.image if which == "image" else self.made.text
        device = self.model.device
        if cache.fixed is not None:
            return cache.fixed[torch.tensor(rows)].to(device)
        inputs = self._blank
        if which == "text":
            inputs = self._tokenize([self.made.texts[row] for row in rows]).to(device)
        elif not cache.boundary:
            pixels = torch.stack([cache.pixels[row] for row in rows]).numpy()
            return self.towers[which].whole(self.base.preprocess.normalise(pixels, device))
        if not cache.boundary:
            return self.towers[which].whole(inputs)
        length = inputs.shape[1] if which == "text" else None
        return self.towers[which].resume(stack_boundaries([cache.boundary[r] for r in rows], length, device), inputs)

    def plain(self, model: nn.Module, examples: Sequence[Pair]) -> Tensor:
        clip = cast(Any, model)
        pixels = np.stack([self.base.preprocess.pixels(pair.read()) for pair in examples])
        images = clip.encode_image(self.base.preprocess.normalise(pixels))
        return cast(Tensor, (images @ clip.encode_text(self._tokenize([pair.text for pair in examples])).T).sum())
