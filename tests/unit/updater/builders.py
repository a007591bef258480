"""Small pools, recipes and batches for the updater's tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters import WeightDelta, trainer_encoder
from updater.data.pools import Pair, Pools, Question
from updater.families.clip_learner import ClipLearner
from updater.families.vlm_learner import VlmLearner
from updater.methods import objectives
from updater.methods.batches import AnswerBatch, Batch, Features, TeacherFeatures, summarise
from updater.recipes import Family, Part, Recipe, Term, load_recipe
from updater.training.result import Limits, TrainResult
from updater.training.train import train
from updater.training.workers import Stopped

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
LIMITS = Limits(gflops=1e6, seconds=120, threads=1, checkpoint_steps=2)


def picture(number: int, side: int = 24) -> bytes:
    return png(np.random.default_rng(number).integers(0, 255, (side, side + 4, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    """A picture, uint8 [h, w, 3], as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(tag: str, count: int) -> tuple[Pair, ...]:
    return tuple(
        Pair(f"{tag}-{i}", f"a {COLOURS[i % 6]} {tag}", partial(picture, hash_of(tag) + i)) for i in range(count)
    )


def hash_of(tag: str) -> int:
    """A number from a word, the same in every process."""
    return sum(ord(letter) * int(31**place) for place, letter in enumerate(tag)) % 100_000


def pools(new: int = 20, reference: int = 20, replay: int = 0) -> Pools:
    return Pools(pairs("car", new), pairs("house", reference), pairs("tree", replay))


def recipe(name: str = "default", **changes: Any) -> Recipe:
    """A shipped recipe made small: if it has new, reference and replayed pairs, three of each in a batch of nine."""
    small: dict[str, Any] = {"max_steps": 5, "batch_size": 9, "rank": 4, "alpha": 8.0}
    values = load_recipe(name).model_dump(mode="json")
    if all(values["mixture"].values()):
        small["mixture"] = {"reference": 0.33, "new": 0.34, "replay": 0.33}
    return Recipe.parse({**values, **small, **changes})


class Small:
    """Scores adapters for recipes that tune their merge weight: the smaller file is the better one."""

    passes = 1

    def __call__(self, directory: Path) -> float:
        return -float((directory / "adapter_model.safetensors").stat().st_size)


def run(base: ClipBase | VlmBase, folder: Path, **options: Any) -> TrainResult:
    """Train into ``folder`` with small defaults of the base's family."""
    asks = base.family == "vlm"
    given: dict[str, Any] = {
        "recipe": recipe("vlm-default" if asks else "default"), "pools": question_pools() if asks else pools(),
        "scored": Small(), "incumbent": None, "seed": 3, "limits": LIMITS,
        "out_dir": folder / "adapters", "work_dir": folder / "work", "device": "cpu", **options,
    }  # fmt: skip
    return train(base, **given)


def resumed(train: Callable[..., TrainResult], question: int, least: int = 1) -> TrainResult:
    """An update that is stopped at question ``n`` of each attempt, at least ``least`` times, and resumed."""
    stops = 0
    while True:
        asked = count(1)
        try:
            result = train(stop=lambda asked=asked: next(asked) == question)
        except Stopped:
            stops += 1
            assert stops < 30
            continue
        assert stops >= least
        return result


def assert_served_as_trained(base: ClipBase, result: TrainResult) -> None:
    """The engine gives the vectors of the trainer, which differ from the base's."""
    engine = ClipEngine(base)
    engine.load(result.adapter, result.directory)
    pixels, words = np.stack([base.preprocess.pixels(picture(i)) for i in range(4)]), ["a red car", "a tree"]
    images, texts = trainer_encoder(base, result.directory)(pixels, words)
    assert np.allclose(images, engine.encode_images(pixels, result.adapter), atol=1e-5)
    assert np.allclose(texts, engine.encode_texts(words, result.adapter), atol=1e-5)


def batch(captions: list[int], parts: list[Part] | None = None, dim: int = 6, seed: int = 0) -> Features:
    made = torch.Generator().manual_seed(seed)
    image, text, *old = (F.normalize(torch.randn(len(captions), dim, generator=made), dim=1) for _ in range(8))
    names = ("base", "incumbent", "momentum")
    return Features(
        image=image.requires_grad_(),
        text=text.requires_grad_(),
        teachers={name: TeacherFeatures(*old[2 * n : 2 * n + 2]) for n, name in enumerate(names)},
        caption=torch.tensor(captions),
        label=torch.full((len(captions),), -1),
        part=tuple(parts or ["new"] * len(captions)),
        scale=7.0,
    )


def total(terms: list[Term], made: Batch, family: Family = "clip") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    found = objectives.values(objectives.build(terms, family), made)
    return torch.stack([t.weight * v for t, v in found]).sum(), {t.name: v for t, v in found}


def questions(tag: str, count: int) -> tuple[Question, ...]:
    return tuple(
        Question(
            f"{tag}-{i}",
            f"which colour has the {tag}?" + " look again!" * (i % 3),
            COLOURS[i % 6],
            partial(picture, hash_of(tag) + i),
        )
        for i in range(count)
    )


def question_pools(new: int = 20, reference: int = 20, replay: int = 0) -> Pools:
    return Pools(questions("car", new), questions("house", reference), questions("tree", replay))


def learner_of(base: VlmBase, pools: Pools, start: WeightDelta | None = None, **changes: Any) -> VlmLearner:
    learner = VlmLearner(base, recipe("vlm-default", **changes), start or {}, seed=0)
    learner.prepare(pools.examples, pools.parts)  # type: ignore[arg-type]
    return learner


def clip_learner_of(
    base: ClipBase, name: str = "default", start: WeightDelta | None = None, **changes: Any
) -> ClipLearner:
    """A prepared learner of a recipe over 12 new, 8 reference and 8 replayed pairs."""
    learner, pool = ClipLearner(base, recipe(name, **changes), start or {}, seed=0), pools(12, 8, 8)
    learner.prepare(pool.examples, pool.parts)  # type: ignore[arg-type]
    return learner


def answers(
    lengths: list[int], vocabulary: int = 7, k: int = 7, parts: list[Part] | None = None, seed: int = 0
) -> tuple[AnswerBatch, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    student, teacher = (2 * torch.randn(tokens, vocabulary, generator=made) for _ in range(2))
    batch = AnswerBatch(
        part=tuple(parts or ["new"] * len(lengths)),
        logits=student.requires_grad_(),
        target=torch.randint(vocabulary, (tokens,), generator=made),
        row=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        teachers={"base": summarise(teacher, k)},
    )
    return batch, teacher
