"""The learner of a CLIP: two towers, compared with each other and with their teachers."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from core.digests import digest12
from ratchet_client.images import open_accepted
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.layers import images_per_pass, set_conv_layout
from serving.engines.preprocess import Preprocess
from updater.adapters import WeightDelta
from updater.adapters.kinds import KINDS
from updater.adapters.trained_layers import Which, first_touched
from updater.budget.bound import Size
from updater.data.pools import Pair, caption_number
from updater.families.clip_towers import SplitTower, TowerPass, stack_boundaries
from updater.methods.batches import AuxiliaryTexts, Features, TeacherFeatures
from updater.methods.objectives import Objective
from updater.recipes import PLACE, Part, Recipe, Views
from updater.step.learner import CHUNK, Learner
from updater.step.shards import Fetched, Shards, Values, spans

WHICH: tuple[Which, Which] = ("image", "text")
SHORT_WORDS = 3
"""Captions of at most this many words name a thing rather than describe it."""


@dataclass
class ObjectiveTexts:
    """An objective's own texts, each with its example, or -1 for a text in every batch."""

    texts: list[str]
    example: list[int]
    teachers: Sequence[str]
    shards: Shards
    tower: TowerPass

    def of(self, rows: Sequence[int]) -> list[int]:
        wanted = {*rows, -1}
        return [number for number, example in enumerate(self.example) if example in wanted]


class ClipLearner(Learner[Pair]):
    """Steps start at each tower's boundary: what no adapter touches is computed once per pair."""

    base: ClipBase

    def __init__(self, base: ClipBase, recipe: Recipe, start: WeightDelta, seed: int, device: str = "cpu") -> None:
        plain = base.build_model()
        kind = KINDS.find(recipe.adapter.kind)
        trained, model = kind.build(base, plain, recipe, start, seed, device)
        set_conv_layout(model.model.get_submodule("visual"))
        super().__init__(base, recipe, model)
        touched = self.model.base_names
        self.learning: dict[Which, bool] = {which: any(tower_of(name) == which for name in trained) for which in WHICH}
        self.towers = {
            which: SplitTower(self.model.model, which, first_touched(touched, plain, which), self.precision)
            for which in WHICH
        }
        self.scale = 1 / recipe.temperature if recipe.temperature else float(plain.logit_scale.exp())  # type: ignore[operator]
        self._tokenize = base.tokenizer()
        self._blank = torch.zeros(1, 3, base.preprocess.size, base.preprocess.size, device=self.model.device)

    def rate_of(self, parameter: str) -> float:
        return self.recipe.image.rate if tower_of(parameter) == "image" else self.recipe.text.rate

    @property
    def longest(self) -> int:
        return self.base.context_length

    def begin(self, between: Callable[[], None]) -> None:
        self.tower_passes = self._tower_passes()
        self.texts = [phrased(pair, self.recipe.caption_templates) for pair in self.examples]
        self.captions = torch.tensor([caption_number(pair.text) for pair in self.examples])
        known = sorted({pair.label for pair in self.examples if pair.label})
        place = {label: number for number, label in enumerate(known)}
        self.labels = torch.tensor([place.get(pair.label, -1) for pair in self.examples])
        domains = {name: number for number, name in enumerate(dict.fromkeys(pair.domain for pair in self.examples))}
        self.domains = torch.tensor([domains[pair.domain] for pair in self.examples])
        self.objective_texts: dict[str, ObjectiveTexts] = {}
        for term, objective in self.objectives:
            objective.begin(self.texts, known)
            wanted = objective.further_texts(self.texts, known, self.parts) if term.weight > 0 else []
            if wanted:
                self.objective_texts[term.name] = self._objective_texts(term.name, wanted, objective, between)

    def _tower_passes(self) -> dict[Which, TowerPass]:
        """Keep boundaries of the text tower first, which take less space, and of the image tower if there is room."""
        left = self.precomputed.room
        passes: dict[Which, TowerPass] = {}
        blank: dict[Which, Tensor] = {"text": self._tokenize([""]).to(self.model.device), "image": self._blank}
        for which in ("text", "image"):
            tower = TowerPass(self.model, self.towers[which], self.learning[which])
            size = tower.boundary_bytes(blank[which], self.longest)
            tower.keep = 0 < size <= left
            left -= size if tower.keep else 0
            passes[which] = tower
        return passes

    @property
    def shard_choices(self) -> str:
        return f"{self.tower_passes['image'].keep} {self.tower_passes['text'].keep}"

    def _objective_texts(
        self, term: str, wanted: Sequence[tuple[int, str]], objective: Objective[Any], between: Callable[[], None]
    ) -> ObjectiveTexts:
        texts = [text for _, text in wanted]
        teachers = [name for name in objective.teachers if name != "momentum"]
        learns = self.learning["text"] and not objective.frozen_texts
        common = TowerPass(self.model, self.towers["text"], learns)
        common.keep = common.learns and self.tower_passes["text"].keep

        def compute(rows: range, _: object) -> Values:
            with self.at_start():
                return self._text_values(common, teachers, [texts[row] for row in rows])

        names = [f"{term}-{'all' if example < 0 else self.parts[example]}" for example, _ in wanted]
        contents = [f"{self.precomputed.key} {common.keep} {text}" for text in texts]
        layout = spans(names, {}, CHUNK)
        shards = Shards(
            self.precomputed.folder, layout, contents, lambda _: Fetched(), compute,
            lambda rows, _: Size((len(rows),), (self._longest([texts[row] for row in rows]),)),
            between, self.team, lambda *gflops: self.afford(*gflops),
        )  # fmt: skip
        return ObjectiveTexts(texts, [example for example, _ in wanted], teachers, shards, common)

    def decode(self, example: Pair, image: bytes) -> np.ndarray:
        return view_pixels(self.base.preprocess, image, example, self.recipe.views)

    def compute(self, rows: range, images: Sequence[np.ndarray]) -> Values:
        few = min(CHUNK, images_per_pass(self.model.model.get_submodule("visual"), self.model.device))
        part = self.parts[rows[0]]
        teachers = [name for name, parts in self.teacher_parts.items() if name != "momentum" and part in parts]
        values: dict[str, list[Tensor]] = {}
        for first in range(0, len(images), few):
            pixels = self.base.preprocess.normalise(np.stack(images[first : first + few]), self.model.device)
            _extend(values, "image", self.tower_passes["image"](pixels, teachers))
        if self.learning["image"] and not self.tower_passes["image"].keep:
            values["image.pixels"] = [torch.from_numpy(image.copy()) for image in images]
        _extend(
            values, "text", self._text_values(self.tower_passes["text"], teachers, [self.texts[row] for row in rows])
        )
        return values

    def shard_size(self, rows: range, images: Sequence[np.ndarray]) -> Size:
        return Size((len(rows),), (self._longest([self.texts[row] for row in rows]),))

    def size(self, rows: Sequence[int]) -> Size:
        """Count rows, and rows plus the objectives' own texts; lengths are tokens of the longest text of each kind."""
        own = [extra.texts[number] for extra in self.objective_texts.values() for number in extra.of(rows)]
        longest = self._longest([self.texts[row] for row in rows])
        counts = len(rows), len(rows) + len(own)
        return Size(counts, (longest + self.padding, self._longest(own) if own else 0))

    def _longest(self, texts: Sequence[str]) -> int:
        return max(int(self._tokenize([text]).shape[1]) for text in texts)

    def _text_values(self, tower: TowerPass, teachers: Sequence[str], texts: Sequence[str]) -> Values:
        values: dict[str, list[Tensor]] = {}
        for first in range(0, len(texts), CHUNK):
            inputs = self._tokenize(list(texts[first : first + CHUNK])).to(self.model.device)
            _extend(values, "", tower(inputs, teachers))
        return values

    def ready(self, rows: Sequence[int]) -> None:
        super().ready(rows)
        for extra in self.objective_texts.values():
            extra.shards.ready(extra.of(rows) or [0])  # at least one, to estimate the cost of others

    def prepared_gflops(self) -> float:
        return super().prepared_gflops() + sum(
            math.fsum(extra.shards.gflops.values()) for extra in self.objective_texts.values()
        )

    def row_gflops(self, rows: Sequence[int]) -> dict[Part, float]:
        own = super().row_gflops(rows)
        for extra in self.objective_texts.values():
            texts = [number for number in extra.of(rows) if extra.example[number] >= 0]
            counts = Counter(self.parts[extra.example[number]] for number in texts)
            for part, count in counts.items():
                per_text = extra.shards.mean_gflops([n for n in texts if self.parts[extra.example[n]] == part])
                own[part] += per_text * count / sum(self.parts[row] == part for row in rows)
        return own

    def texts_gflops(self) -> float:
        total = 0.0
        for extra in self.objective_texts.values():
            common = [number for number, example in enumerate(extra.example) if example < 0]
            total += extra.shards.mean_gflops(common) * len(common)
        return total

    def length(self, row: int) -> int:
        return self._tokenize([self.texts[row]]).shape[1]

    def batch(self, rows: Sequence[int]) -> Features:
        self.ready(rows)
        index = torch.tensor(rows)
        device = self.model.device
        teachers = {name: self._teacher(name, rows) for name in self.teacher_parts if name != "momentum"}
        if self.momentum is not None:
            with torch.no_grad(), self.model.holding(self.momentum.values):
                teachers["momentum"] = TeacherFeatures(self.features("image", rows), self.features("text", rows))
        return Features(
            part=tuple(self.parts[row] for row in rows),
            image=self.features("image", rows),
            text=self.features("text", rows),
            teachers=teachers,
            caption=self.captions[index].to(device),
            label=self.labels[index].to(device),
            scale=self.scale,
            texts={name: self._auxiliary_texts(extra, rows) for name, extra in self.objective_texts.items()},
            domain=self.domains[index].to(device),
        )

    def _teacher(self, name: str, rows: Sequence[int]) -> TeacherFeatures:
        """Features of a teacher; NaN for rows that no objective compares with it."""
        places = [place for place, row in enumerate(rows) if self.parts[row] in self.teacher_parts[name]]
        image, text = (torch.full((len(rows), self.base.dim), torch.nan, device=self.model.device) for _ in WHICH)
        if places:
            known = [rows[place] for place in places]
            image[places] = self._stacked(f"image.{name}", known)
            text[places] = self._stacked(f"text.{name}", known)
        return TeacherFeatures(image, text)

    def _stacked(self, name: str, rows: Sequence[int]) -> Tensor:
        return torch.stack(self.shards.get(name, rows)).to(self.model.device)

    def features(self, which: Which, rows: Sequence[int]) -> Tensor:
        """Student features [n, dim] of unit length, computed from as far up the tower as possible."""
        if which == "text":
            return self._texts(self.tower_passes["text"], self.shards, "text.", self.texts, rows)
        if not self.tower_passes["image"].learns:
            return self._stacked("image.fixed", rows)
        return self.passes(self._run_images, rows)

    def _run_images(self, rows: Sequence[int]) -> Tensor:
        device, tower = self.model.device, self.tower_passes["image"]
        if not tower.keep:
            pixels = torch.stack(self.shards.get("image.pixels", rows)).numpy()
            return tower.tower.whole(self.base.preprocess.normalise(pixels, device))
        boundary = stack_boundaries(self.shards.get("image.boundary", rows), None, device)
        return tower.tower.resume(boundary, self._blank)

    def _texts(
        self, tower: TowerPass, shards: Shards, prefix: str, texts: Sequence[str], rows: Sequence[int]
    ) -> Tensor:
        device = self.model.device
        if not tower.learns:
            return torch.stack(shards.get(f"{prefix}fixed", rows)).to(device)

        def run(rows: Sequence[int]) -> Tensor:
            tokens = self._tokenize([texts[row] for row in rows])
            inputs = (F.pad(tokens, (0, self.padding)) if shards is self.shards else tokens).to(device)
            if not tower.keep:
                return tower.tower.whole(inputs)
            boundary = stack_boundaries(shards.get(f"{prefix}boundary", rows), inputs.shape[1], device)
            return tower.tower.resume(boundary, inputs)

        return self.passes(run, rows)

    def _auxiliary_texts(self, extra: ObjectiveTexts, rows: Sequence[int]) -> AuxiliaryTexts:
        device = self.model.device
        place = {row: number for number, row in enumerate(rows)} | {-1: -1}
        chosen = extra.of(rows)
        shards, empty = extra.shards, torch.zeros(0, self.base.dim, device=device)
        if not chosen:
            none = torch.zeros(0, dtype=torch.long, device=device)
            return AuxiliaryTexts(text=empty, teachers=dict.fromkeys(extra.teachers, empty), row=none, number=none)
        return AuxiliaryTexts(
            text=self._texts(extra.tower, shards, "", extra.texts, chosen),
            teachers={name: torch.stack(shards.get(name, chosen)).to(device) for name in extra.teachers},
            row=torch.tensor([place[extra.example[number]] for number in chosen], dtype=torch.long, device=device),
            number=torch.tensor(chosen, dtype=torch.long, device=device),
        )

    def plain(self, model: nn.Module, examples: Sequence[Pair]) -> Tensor:
        clip = cast(Any, model)
        pixels = np.stack([self.base.preprocess.pixels(pair.read()) for pair in examples])
        tokens = self._tokenize([pair.text for pair in examples])
        with self.computing():
            images, texts = clip.encode_image(self.base.preprocess.normalise(pixels)), clip.encode_text(tokens)
        return cast(Tensor, (images.float() @ texts.float().T).sum())


def _extend(values: dict[str, list[Tensor]], tower: str, more: Values) -> None:
    for name, rows in more.items():
        values.setdefault(f"{tower}.{name}" if tower else name, []).extend(rows)


def view_pixels(preprocess: Preprocess, image: bytes, pair: Pair, views: Views) -> np.ndarray:
    """Pixels ``uint8 [size, size, 3]`` of a pair's view; view 0 is what serving sees of the image. Other views are a
    crop in the image's proportions, at least ``views.area`` of it, at a random place, mirrored half of the time with
    ``views.flip``. Raises :class:`core.errors.RecordError` for an unacceptable image."""
    if pair.view == 0:
        return preprocess.pixels(image)
    chance = random.Random(int(digest12(f"{pair.id} {pair.view}".encode()), 16))  # noqa: S311 - nothing is kept secret
    shrinks = math.sqrt(views.area)  # of a side, at most: decode that much more

    def needed(size: tuple[int, int]) -> tuple[int, int]:
        width, height = preprocess.needed(size)
        return math.ceil(width / shrinks), math.ceil(height / shrinks)

    picture = open_accepted(image).decode(needed)
    side = math.sqrt(chance.uniform(views.area, 1.0))
    width, height = max(1, round(picture.width * side)), max(1, round(picture.height * side))
    left, top = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    if views.flip and chance.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocess.pixels(part)


def phrased(pair: Pair, templates: Sequence[str]) -> str:
    """Caption to learn: short ones and those equal to the label are put into a template, another for each view."""
    text = pair.text.strip()
    if not templates or not text or (text != pair.label and len(text.split()) > SHORT_WORDS):
        return pair.text
    first = int(digest12(pair.id.encode()), 16)
    return templates[(first + pair.view) % len(templates)].replace(PLACE, text)
