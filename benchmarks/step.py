"""``ratchet bench step``: the cost of a training step compared with one of open_clip's own training loop.

Three sides, each in float32 and in bfloat16, in turns in one process, on the same threads, with the same rows of the
same batches:

default         a recipe's step as the trainer does it: from the boundaries of frozen blocks and cached teachers
open_clip       a step as in ``open_clip_train``: both towers from decoded pixels and token ids, ``ClipLoss``, AdamW,
                over the parameters that the recipe trains; nothing is distilled
open_clip_full  the same over all parameters of both towers, as its users fine-tune

In bfloat16 open_clip's sides are those of its ``--precision amp_bf16``. What the recipe computes once per example is
reported separately, and as a share of each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
from open_clip.loss import ClipLoss
from open_clip_train.precision import get_autocast
from rich.table import Table
from torch import Tensor, nn

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.errors import RatchetError
from core.progress import track
from core.settings import Settings
from serving.engines.clip_base import ClipBase, load_base
from streams.publish.folders import read_folder
from updater.adapters.kinds import KINDS
from updater.bases import reference_folders
from updater.data.mixture import BatchPlan, plan_batches
from updater.data.pools import Pair, Pools
from updater.families import make_learner
from updater.methods.optimizers import learning_rate
from updater.recipes import Part, Recipe, TrainPrecision, load_recipe
from updater.service.process import use_environment
from updater.step.learner import AnyLearner
from updater.step.passes import training_precision
from updater.training.measure import measure

WARM_UP = 3
FAST: dict[str, Any] = {"steps": 2, "pairs": 48, "batch": 24}
"""Sizes of ``--fast``: enough to see that it runs."""
SIDES = ("default", "open_clip", "open_clip_full")
OPEN_CLIP_PRECISION: dict[TrainPrecision, str] = {"float32": "fp32", "bfloat16": "amp_bf16"}
PRECISIONS: tuple[TrainPrecision, ...] = get_args(TrainPrecision)
CPU = torch.device("cpu")
RESAMPLES = 10_000
MAX_SCALE = float(np.log(100))
"""The bound of open_clip's loop on the logarithm of the scale."""


@dataclass
class _Turn:
    """One side in one precision, and how long each step took after warm-up."""

    side: str
    precision: TrainPrecision
    step: Callable[[int, Tensor, Tensor], None]
    seconds: list[float] = field(default_factory=list)


@dataclass
class Prepared:
    """The recipe's side before its first step."""

    learner: AnyLearner
    plan: BatchPlan
    pools: Pools
    examples: list[Pair]
    seconds: float

    def rows(self, step: int) -> list[int]:
        return self.pools.rows(self.plan.batch(step))


def run(
    settings: Settings, steps: int = 20, pairs: int = 480, recipe: str = "default", batch: int | None = None
) -> dict[str, Any]:
    """Measure with the settings' CLIP, on its reference pool. Returns the figures.

    Args:
        steps: of each side in each precision, after warm-up.
        pairs: examples that are prepared; an update's whole preparation is scaled from them.
        batch: rows of a step; the recipe's when unset.

    Raises RatchetError if the base is not registered, or has no reference pool.
    """
    base, plan = load_base(settings.home, settings.base.clip), load_recipe(recipe)
    plan = plan.model_copy(update={"batch_size": batch or plan.batch_size})
    examples = _examples(settings, pairs)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.updater.threads)
    try:
        prepared = {each: _prepare(base, plan.model_copy(update={"precision": each}), examples) for each in PRECISIONS}
        batches = _Batches(base, prepared["float32"])
        _, adapted = KINDS.find(plan.adapter.kind).build(base, base.build_model(), plan, {}, 0, "cpu")
        small, full = _OpenClip(adapted.model), _OpenClip(base.build_model().requires_grad_(True))
        turns: list[_Turn] = []
        for each in PRECISIONS:
            ours = _Ours(prepared[each], plan, WARM_UP + steps)
            turns += [
                _Turn("default", each, ours.step),
                _Turn("open_clip", each, partial(small.step, each)),
                _Turn("open_clip_full", each, partial(full.step, each)),
            ]
        for number in track(range(WARM_UP + steps), "steps in turns"):
            images, texts = batches.of(number)
            for turn in turns if number % 2 == 0 else reversed(turns):
                began = time.perf_counter()
                turn.step(number, images, texts)
                if number >= WARM_UP:
                    turn.seconds.append(time.perf_counter() - began)
        return _figures(settings, base, plan, prepared, {(turn.side, turn.precision): turn.seconds for turn in turns})
    finally:
        torch.set_num_threads(before)


def _examples(settings: Settings, pairs: int) -> list[Pair]:
    items = [item for folder in reference_folders(settings) for item in read_folder(folder, split="train") if item.text]
    if not items:
        raise RatchetError(
            f"there is no reference pool for {settings.base.clip!r} in {settings.home}.",
            "Run `ratchet demo data prepare noto`, or name folders in updater.reference.",
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
    """Batches as of open_clip's loader: normalised pixels [n, 3, S, S] and token IDs [n, longest]."""

    def __init__(self, base: ClipBase, prepared: Prepared) -> None:
        self.base, self.prepared = base, prepared
        self.tokenize = base.tokenizer()
        self.pixels = np.stack([base.preprocess.pixels(pair.read()) for pair in prepared.examples])

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self.prepared.rows(number)
        texts = [self.prepared.examples[row].text for row in rows]
        return self.base.preprocess.normalise(self.pixels[rows]), self.tokenize(texts)


class _Ours:
    """The recipe's step, as in ``updater/training/trainer.py``."""

    def __init__(self, prepared: Prepared, recipe: Recipe, steps: int) -> None:
        self.prepared, self.recipe, self.steps = prepared, recipe, steps

    def step(self, number: int, images: Tensor, texts: Tensor) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.prepared.learner.forward_backward(self.prepared.rows(number))
        self.prepared.learner.optimizer_step(learning_rate(self.recipe.schedule, number, self.steps, first=True))
        torch.use_deterministic_algorithms(False)


class _OpenClip:
    """A step of ``open_clip_train.train.train_one_epoch``: one process, its precisions, optimizer and bounds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model.train())
        self.loss = ClipLoss()
        learns = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        plain = [each for name, each in learns if each.ndim < 2 or "bias" in name]
        decayed = [each for name, each in learns if not (each.ndim < 2 or "bias" in name)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

    def step(self, precision: TrainPrecision, number: int, images: Tensor, texts: Tensor) -> None:
        self.optimizer.zero_grad()
        with get_autocast(OPEN_CLIP_PRECISION[precision], device_type="cpu")():
            loss = self.loss(*self.model(images, texts))
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_SCALE)


def _figures(
    settings: Settings,
    base: ClipBase,
    recipe: Recipe,
    prepared: Mapping[TrainPrecision, Prepared],
    seconds: Mapping[tuple[str, TrainPrecision], list[float]],
) -> dict[str, Any]:
    first = prepared["float32"]
    rows = first.rows(0)
    batches = [first.rows(number) for number in range(recipe.max_steps)]
    cost = measure(first.learner, first.examples, batches)
    sizes: dict[Part, int] = {
        "new": settings.updater.min_new_samples, "reference": recipe.reference_limit, "replay": recipe.replay_limit,
    }  # fmt: skip
    plan = plan_batches(recipe.mixture, recipe.batch_size, sizes, seed=0)
    steps = cost.steps_within(settings.budget.gflops_per_update, recipe.max_steps, plan)
    pairs = sum(plan.visited(part, steps) for part in plan.counts)
    figures: dict[str, Any] = {"recipe": recipe.name, "model": settings.base.clip, "batch": len(rows)}
    for precision in PRECISIONS:
        middle = {side: float(np.median(seconds[side, precision])) for side in SIDES}
        figures |= {f"seconds_{side}_{precision}": round(middle[side], 4) for side in SIDES}
        for side in SIDES[1:]:
            low, high = _interval(seconds["default", precision], seconds[side, precision])
            name = f"step_to_{side}_{precision}"
            figures[name] = round(middle["default"] / middle[side], 3)
            figures[f"{name}_low"], figures[f"{name}_high"] = round(low, 3), round(high, 3)
        per_pair = prepared[precision].seconds / len(first.examples)
        share = per_pair * pairs / steps
        figures |= {
            f"seconds_preparation_per_pair_{precision}": round(per_pair, 4),
            f"seconds_preparation_per_step_{precision}": round(share, 4),
            f"with_preparation_to_open_clip_{precision}": round((middle["default"] + share) / middle["open_clip"], 3),
        }
    return figures | {
        "precision_auto": training_precision(recipe.model_copy(update={"precision": "auto"}), base, CPU),
        "pairs_of_an_update": pairs,
        "steps_of_an_update": steps,
        "gflops_of_a_step": round(cost.step_gflops, 1),
        "steps_measured": len(seconds["default", "float32"]),
        "threads": settings.updater.threads,
        "machine": machine(),
    }


def _interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95% interval of the ratio of medians, resampling turns, which keep their sides together (Efron's bootstrap)."""
    drawn = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    ratios = np.median(np.array(ours)[drawn], axis=1) / np.median(np.array(theirs)[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def show(figures: dict[str, Any]) -> None:
    title = f"Recipe {figures['recipe']!r} and open_clip ({figures['model']}, batch {figures['batch']})"
    table = Table("a step of", "precision", "s", "recipe / it", "95%", title=title)
    for precision in PRECISIONS:
        for side in SIDES:
            name = f"step_to_{side}_{precision}"
            interval = f"{figures[f'{name}_low']} to {figures[f'{name}_high']}" if name in figures else ""
            table.add_row(
                side, precision, str(figures[f"seconds_{side}_{precision}"]), str(figures.get(name, "")), interval
            )
        table.add_row(
            "preparation, a step's part", precision, str(figures[f"seconds_preparation_per_step_{precision}"]),
            str(figures[f"with_preparation_to_open_clip_{precision}"]), "with it, to open_clip",
        )  # fmt: skip
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("step", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each side and precision, after warm-up (20)")
    parser.add_argument("--pairs", type=int, default=480, help="pairs that are prepared (480)")
    parser.add_argument("--recipe", default="default", help="recipe, a name or a YAML path (default)")
    parser.add_argument("--batch", type=int, default=None, help="rows of a step (the recipe's)")
    parser.add_argument("--fast", action="store_true", help="a few small steps, to see that it runs")
    options = parser.parse_args(arguments)
    use_environment()
    size: dict[str, Any] = (
        FAST if options.fast else {"steps": options.steps, "pairs": options.pairs, "batch": options.batch}
    )
    show(run(settings, recipe=options.recipe, **size))
