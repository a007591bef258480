from __future__ import annotations

from typing import Any

import torch

from demo.clip.projections import (
    Classes,
    Pairs,
    ProjectionRecipe,
    multi_positive_loss,
    train_projections,
)

HOW: dict[str, Any] = {"epochs": 20, "batch": 64, "warmup_steps": 5, "dropout": 0.1, "lr": 0.02}
FAST = ProjectionRecipe(class_weight=0.0, **HOW)


def _world(seed: int = 0, n: int = 256) -> tuple[Pairs, torch.Tensor]:
    """Texts on a sphere, and images that are an unknown linear map of them (never negative, like pooled features)."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, 40, generator=made)
    texts = torch.randn(n, 16, generator=made)
    images = (texts @ mixing * 0.3 + 1).clamp(min=0)
    return Pairs(images, texts, torch.arange(n)), mixing


def _recall(images: torch.Tensor, texts: torch.Tensor) -> float:
    images, texts = (torch.nn.functional.normalize(v, dim=1) for v in (images, texts))
    return float(((images @ texts.T).argmax(dim=1) == torch.arange(len(images))).float().mean())


def test_pairs_never_seen_are_matched() -> None:
    pairs, _ = _world(n=320)
    train = Pairs(pairs.images[:256], pairs.texts[:256], torch.arange(256))
    found = train_projections(train, recipe=FAST)
    images, texts = pairs.images[256:] @ found.image.T, pairs.texts[256:] @ found.text.T
    assert _recall(images, texts) > 0.8
    assert found.losses[-1] < found.losses[0] / 2


def test_a_classifier_teaches_classes_of_which_no_picture_was_seen() -> None:
    """Image features are in two unrelated halves; pairs show one half, the classifier knows the other."""
    made = torch.Generator().manual_seed(3)
    pairs, _ = _world(n=256)
    classes = torch.randn(10, 16, generator=made)
    directions = torch.randn(10, 40, generator=made)
    noise = torch.randn(256, 40, generator=made)
    seen = Pairs((pairs.images + 0.5 * noise).clamp(min=0), pairs.texts, pairs.text_of)
    covariance = torch.cov(seen.images.T)
    head = directions @ torch.linalg.inv(covariance)
    means = seen.images.mean(dim=0) + directions * (
        seen.images.std(dim=0).norm() / directions.norm(dim=1, keepdim=True)
    )
    without = train_projections(seen, None, FAST)
    taught = train_projections(seen, Classes(head, classes), ProjectionRecipe(class_weight=0.5, **HOW))
    assert _recall(means @ without.image.T, classes @ without.text.T) < 0.5
    assert _recall(means @ taught.image.T, classes @ taught.text.T) > 0.9


def test_equal_texts_are_all_positives() -> None:
    texts = torch.tensor([0, 0, 1])
    perfect = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    strict = torch.tensor([[9.0, -9.0, -9.0], [-9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    shared = float(multi_positive_loss(perfect, texts))
    # Two of three rows can do no better than halve their mass: 2/3 ln 2.
    assert abs(shared - 2 / 3 * 0.6931) < 1e-3
    assert float(multi_positive_loss(strict, texts)) > 5
