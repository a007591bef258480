"""The learner of a CLIP: two towers, compared with each other and with their teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from serving.engines.base import ClipBase
from serving.engines.conv_layout import set_conv_layout
from serving.engines.spaces import tower_of
from updater.adapters import AdapterModel, Delta, LoraModel, WeightModel
from updater.adapters.kinds import LORA, find
from updater.families.clip.prepare import Prepared, TowerCache, prepare, prepare_texts, stack_boundaries
from updater.families.clip.towers import SplitTower, Which, first_touched, trained_modules, trained_parameters
from updater.learner import Learner
from updater.objectives import Features, Sides, Texts
from updater.pools import Pair, caption_number
from updater.recipes import Part, Recipe

WHICH: tuple[Which, Which] = ("image", "text")


@dataclass
class Further:
    """Texts of an objective's own: each with its example, or -1."""

    texts: list[str]
    example: list[int]
    cache: TowerCache


class ClipLearner(Learner[Pair]):
    """Steps start at each tower's boundary: what no adapter touches is computed once per pair."""

    base: ClipBase

    def __init__(self, base: ClipBase, recipe: Recipe, start: Delta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        trained, model = _adapted(base, plain, recipe, start, seed, device)
        set_conv_layout(model.model.get_submodule("visual"))
        super().__init__(base, recipe, model)
        touched = self.model.base_names
        self.learning: dict[Which, bool] = {which: any(tower_of(name) == which for name in trained) for which in WHICH}
        self.towers = {
            which: SplitTower(self.model.model, which, first_touched(touched, plain, which)) for which in WHICH
        }
        self.scale = 1 / recipe.temperature if recipe.temperature else float(plain.logit_scale.exp())  # type: ignore[operator]
        taught = {name for term, objective in self.objectives if term.weight > 0 for name in objective.teachers}
        self.cached = sorted(taught - {"momentum"})
        self._tokenize = base.tokenizer()
        self._blank = torch.zeros(1, 3, base.preprocess.size, base.preprocess.size, device=self.model.device)

    def rate_of(self, parameter: str) -> float:
        return self.recipe.image.rate if tower_of(parameter) == "image" else self.recipe.text.rate

    def prepare(
        self, examples: Sequence[Pair], parts: Sequence[Part], between: Callable[[], None] = lambda: None
    ) -> None:
        self.made: Prepared = prepare(self.base, self.model, self.towers, self.learning, examples, self.cached, between)
        self.parts = list(parts)
        self.lengths = [self._tokenize([pair.text]).shape[1] for pair in examples]
        self.captions = torch.tensor([caption_number(pair.text) for pair in examples])
        known = sorted({pair.label for pair in examples if pair.label})
        place = {label: number for number, label in enumerate(known)}
        self.labels = torch.tensor([place.get(pair.label, -1) for pair in examples])
        self.further: dict[str, Further] = {}
        for term, objective in self.objectives:
            objective.begin(self.made.texts, known)
            wanted = objective.further_texts(self.made.texts, known) if term.weight > 0 else []
            if wanted:
                texts = [text for _, text in wanted]
                learns = self.learning["text"] and not objective.frozen_texts
                cache = prepare_texts(self.base, self.model, self.towers["text"], learns, texts, self.cached)
                self.further[term.name] = Further(texts, [example for example, _ in wanted], cache)
                between()

    def length(self, row: int) -> int:
        return self.lengths[row]

    def batch(self, rows: Sequence[int]) -> Features:
        index = torch.tensor(rows)
        device = self.model.device
        image, text = self.made.image.teachers, self.made.text.teachers
        teachers = {name: Sides(image[name][index].to(device), text[name][index].to(device)) for name in self.cached}
        if self.momentum is not None:
            with torch.no_grad(), self.model.holding(self.momentum.values):
                teachers["momentum"] = Sides(self.features("image", rows), self.features("text", rows))
        return Features(
            part=tuple(self.parts[row] for row in rows),
            image=self.features("image", rows),
            text=self.features("text", rows),
            teachers=teachers,
            caption=self.captions[index].to(device),
            label=self.labels[index].to(device),
            scale=self.scale,
            texts={name: self._further(further, rows) for name, further in self.further.items()},
        )

    def features(self, which: Which, rows: Sequence[int]) -> Tensor:
        """Student features [n, dim] of unit length, from as far up the tower as possible."""
        if which == "text":
            return self._texts(self.made.text, self.made.texts, rows)
        cache = self.made.image
        if cache.fixed is not None:
            return cache.fixed[torch.tensor(rows)].to(self.model.device)
        return self.passes(self._run_images, rows)

    def _run_images(self, rows: Sequence[int]) -> Tensor:
        cache, device = self.made.image, self.model.device
        if not cache.boundary:
            pixels = torch.stack([cache.pixels[row] for row in rows]).numpy()
            return self.towers["image"].whole(self.base.preprocess.normalise(pixels, device))
        boundary = stack_boundaries([cache.boundary[row] for row in rows], None, device)
        return self.towers["image"].resume(boundary, self._blank)

    def _texts(self, cache: TowerCache, texts: Sequence[str], rows: Sequence[int]) -> Tensor:
        device = self.model.device
        if cache.fixed is not None:
            return cache.fixed[torch.tensor(rows)].to(device)

        def run(rows: Sequence[int]) -> Tensor:
            inputs = self._tokenize([texts[row] for row in rows]).to(device)
            if not cache.boundary:
                return self.towers["text"].whole(inputs)
            boundary = stack_boundaries([cache.boundary[row] for row in rows], inputs.shape[1], device)
            return self.towers["text"].resume(boundary, inputs)

        return self.passes(run, rows)

    def _further(self, further: Further, rows: Sequence[int]) -> Texts:
        device = self.model.device
        place = {row: number for number, row in enumerate(rows)} | {-1: -1}
        chosen = [number for number, example in enumerate(further.example) if example in place]
        index = torch.tensor(chosen, dtype=torch.long)
        empty = torch.zeros(0, self.base.dim, device=device)
        return Texts(
            text=self._texts(further.cache, further.texts, chosen) if chosen else empty,
            teachers={name: values[index].to(device) for name, values in further.cache.teachers.items()},
            row=torch.tensor([place[further.example[number]] for number in chosen], dtype=torch.long, device=device),
            number=index.to(device),
        )

    def plain(self, model: nn.Module, examples: Sequence[Pair]) -> Tensor:
        clip = cast(Any, model)
        pixels = np.stack([self.base.preprocess.pixels(pair.read()) for pair in examples])
        images = clip.encode_image(self.base.preprocess.normalise(pixels))
        return cast(Tensor, (images @ clip.encode_text(self._tokenize([pair.text for pair in examples])).T).sum())


def _adapted(
    base: ClipBase, plain: nn.Module, recipe: Recipe, start: Delta, seed: int, device: str
) -> tuple[list[str], AdapterModel]:
    """Names of what learns, and the model in which it does."""
    kind = recipe.adapter.kind
    if kind == LORA:
        layers = trained_modules(base, plain, recipe)
        return layers, LoraModel(base, layers, recipe.rank, recipe.alpha, start, seed, device)
    weights = trained_parameters(base, plain, recipe, find(kind).selects)
    options = recipe.adapter.options
    return weights, WeightModel(base, weights, kind, options, recipe.rank, recipe.alpha, start, seed, device)
