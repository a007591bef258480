"""``ratchet bench step``: what a training step costs beside one of open_clip's own training loop.

Three sides, in turns in one process, on the same threads, with the same rows of the same batches:

default    a recipe's step as the trainer does it: from the boundaries of frozen blocks and cached teachers
open_clip  a step as in ``open_clip_train``: both towers from decoded pixels and token ids, ``ClipLoss``, AdamW over
           all parameters; nothing is distilled
locked     the same where only those layers learn that the recipe adapts, and the blocks below are frozen

What the recipe computes once per example is told beside, and as a share of each step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from open_clip.loss import ClipLoss
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import machine
from ops.errors import RatchetError
from ops.progress import track
from ops.settings import Settings
from serving.engines.base import ClipBase, load_base
from streams.folders import read_folder
from updater.base import reference_folders
from updater.cost import measure
from updater.families import make_learner
from updater.families.clip.towers import trained_modules
from updater.learner import AnyLearner
from updater.mixture import BatchPlan, plan_batches
from updater.pools import Pair, Pools
from updater.process import use_environment
from updater.recipes import Part, Recipe, load_recipe
from updater.schedules import learning_rate

WARM_UP = 3
SIDES = ("default", "open_clip", "locked")
RESAMPLES = 10_000
MAX_SCALE = float(np.log(100))
"""Where open_clip's loop bounds the logarithm of the scale."""


@dataclass
class Prepared:
    """The recipe's side before its first step."""

    learner: AnyLearner
    plan: BatchPlan
    pools: Pools
    examples: list[Pair]
    seconds: float
    """For all examples."""

    def rows(self, step: int) -> list[int]:
        """Numbers of the examples in a batch."""
        return self.pools.rows(self.plan.batch(step))


def run(settings: Settings, steps: int = 20, pairs: int = 480, recipe: str = "default") -> dict[str, Any]:
    """Measure with the settings' CLIP, on its reference pool. Returns the figures.

    Args:
        steps: of each side, after warm-up.
        pairs: examples that are prepared; an update's whole preparation is scaled from them.

    Raises:
        RatchetError: the base is not registered, or has no reference pool.
    """
    base, plan = load_base(settings.home, settings.base.clip), load_recipe(recipe)
    examples = _examples(settings, pairs)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.updater.threads)
    try:
        prepared = _prepare(base, plan, examples)
        batches = _Batches(base, prepared)
        sides: dict[str, _Ours | _OpenClip] = {
            "default": _Ours(prepared, plan, WARM_UP + steps),
            "open_clip": _OpenClip(base.build_model().requires_grad_(True)),
            "locked": _OpenClip(_partly(base, plan)),
        }
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in track(range(WARM_UP + steps), "steps in turns"):
            images, texts = batches.of(number)
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                began = time.perf_counter()
                sides[side].step(number, images, texts)
                if number >= WARM_UP:
                    seconds[side].append(time.perf_counter() - began)
        return _figures(settings, plan, prepared, seconds)
    finally:
        torch.set_num_threads(before)


def _examples(settings: Settings, pairs: int) -> list[Pair]:
    items = [item for folder in reference_folders(settings) for item in read_folder(folder, split="train") if item.text]
    if not items:
        raise RatchetError(
            f"there is no reference pool for {settings.base.clip!r} in {settings.home}.",
            "Run `ratchet data prepare noto`, or name folders in updater.reference.",
        )
    chosen = [items[number * len(items) // pairs] for number in range(pairs)]
    return [Pair(f"{number}", item.text, item.bytes) for number, item in enumerate(chosen)]


def _prepare(base: ClipBase, recipe: Recipe, examples: list[Pair]) -> Prepared:
    learner = make_learner(base, recipe, {}, seed=0)
    third = len(examples) // 3
    pools = Pools(tuple(examples[:third]), tuple(examples[third : 2 * third]), tuple(examples[2 * third :]))
    plan = plan_batches(recipe.mixture, recipe.batch_size, pools.sizes, seed=0)
    began = time.perf_counter()
    learner.prepare(pools.examples, pools.parts)
    learner.ready(range(len(examples)))
    return Prepared(learner, plan, pools, examples, time.perf_counter() - began)


class _Batches:
    """Batches as open_clip's loader hands them over: normalised pixels [n, 3, S, S] and token ids [n, longest]."""

    def __init__(self, base: ClipBase, prepared: Prepared) -> None:
        self.base, self.prepared = base, prepared
        self.tokenize = base.tokenizer()
        self.pixels = np.stack([base.preprocess.pixels(pair.read()) for pair in prepared.examples])

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self.prepared.rows(number)
        texts = [self.prepared.examples[row].text for row in rows]
        return self.base.preprocess.normalise(self.pixels[rows]), self.tokenize(texts)


class _Ours:
    """The recipe's step, as in ``updater/train.py``."""

    def __init__(self, prepared: Prepared, recipe: Recipe, steps: int) -> None:
        self.prepared, self.recipe, self.steps = prepared, recipe, steps

    def step(self, number: int, images: Tensor, texts: Tensor) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.prepared.learner.backward(self.prepared.rows(number))
        self.prepared.learner.update(learning_rate(self.recipe.schedule, number, self.steps, first=True))
        torch.use_deterministic_algorithms(False)


class _OpenClip:
    """A step of ``open_clip_train.train.train_one_epoch``: one process, float32, its optimizer and its bounds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model.train())
        self.loss = ClipLoss()
        learns = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        plain = [each for name, each in learns if each.ndim < 2 or "bias" in name]
        decayed = [each for name, each in learns if not (each.ndim < 2 or "bias" in name)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

    def step(self, number: int, images: Tensor, texts: Tensor) -> None:
        self.optimizer.zero_grad()
        image_features, text_features, scale = self.model(images, texts)
        self.loss(image_features, text_features, scale).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_SCALE)


def _partly(base: ClipBase, recipe: Recipe) -> nn.Module:
    """The model in which only the layers learn that the recipe adapts."""
    model = base.build_model()
    for name in trained_modules(base, model, recipe):
        model.get_submodule(name).requires_grad_(True)
    return model


def _figures(settings: Settings, recipe: Recipe, prepared: Prepared, seconds: dict[str, list[float]]) -> dict[str, Any]:
    middle = {side: float(np.median(took)) for side, took in seconds.items()}
    per_pair = prepared.seconds / len(prepared.examples)
    rows = prepared.rows(0)
    batches = [prepared.rows(number) for number in range(recipe.max_steps)]
    cost = measure(prepared.learner, prepared.examples, batches)
    sizes: dict[Part, int] = {
        "new": settings.updater.min_new_samples, "reference": recipe.reference_limit, "replay": recipe.replay_limit,
    }  # fmt: skip
    plan = plan_batches(recipe.mixture, recipe.batch_size, sizes, seed=0)
    steps = cost.steps_within(settings.budget.gflops_per_update, recipe.max_steps, plan)
    pairs = sum(plan.visited(part, steps) for part in plan.counts)
    share = per_pair * pairs / steps
    figures: dict[str, Any] = {"recipe": recipe.name, "base": settings.base.clip, "batch_size": len(rows)}
    for side in SIDES:
        figures[f"seconds_{side}"] = round(middle[side], 4)
    for name, other in (("ratio", "open_clip"), ("ratio_to_locked", "locked")):
        low, high = _interval(seconds["default"], seconds[other])
        figures[name] = round(middle["default"] / middle[other], 3)
        figures[f"{name}_low"], figures[f"{name}_high"] = round(low, 3), round(high, 3)
    return figures | {
        "ratio_with_preparation": round((middle["default"] + share) / middle["open_clip"], 3),
        "seconds_preparation_per_pair": round(per_pair, 4),
        "seconds_preparation_per_step": round(share, 4),
        "pairs_of_an_update": pairs,
        "steps_of_an_update": steps,
        "gflops_of_a_step": round(cost.step_gflops, 1),
        "steps_measured": len(seconds["default"]),
        "threads": settings.updater.threads,
        "machine": machine(),
    }


def _interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95% of the ratio of medians when turns are drawn again; a turn keeps its sides together (Efron's bootstrap)."""
    drawn = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    ratios = np.median(np.array(ours)[drawn], axis=1) / np.median(np.array(theirs)[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def show(figures: dict[str, Any]) -> None:
    """A table for people, one JSON line for machines (last)."""
    table = Table("a step of", "s", "recipe / it", "95%", title=f"Recipe {figures['recipe']!r} beside open_clip")
    for side, ratio in (("default", ""), ("open_clip", "ratio"), ("locked", "ratio_to_locked")):
        interval = f"{figures[f'{ratio}_low']} to {figures[f'{ratio}_high']}" if ratio else ""
        table.add_row(side, str(figures[f"seconds_{side}"]), str(figures.get(ratio, "")), interval)
    table.add_row(
        "preparation, a step's part", str(figures["seconds_preparation_per_step"]),
        str(figures["ratio_with_preparation"]), "with it",
    )  # fmt: skip
    Console().print(table)
    print(json.dumps(figures), flush=True)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """``ratchet bench step``."""
    parser = argparse.ArgumentParser(prog="ratchet bench step", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20, help="steps of each side, after warm-up (20)")
    parser.add_argument("--pairs", type=int, default=480, help="pairs that are prepared (480)")
    parser.add_argument("--recipe", default="default", help="recipe, a name or a YAML path (default)")
    asked = parser.parse_args(arguments)
    use_environment()
    show(run(settings, steps=asked.steps, pairs=asked.pairs, recipe=asked.recipe))
