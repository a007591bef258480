"""Trains what joins the two frozen towers on cached features: two linear maps and a logit scale.

The text map starts as the identity and learns slowly: images are mapped into MiniLM's space, which already relates
words, instead of fitting both to 12,000 pairs, so concepts without pictures keep a sensible place.

The image tower's ImageNet classifier adds knowledge. Under its linear discriminant model (covariance C, class means
m_c, weights w_c = C^-1 (m_c - m)) the means are m_c = m + C w_c, so features of 1,000 photo classes can be sampled
without photos and paired with class names. On photos new to the base this doubles recall; drawn domains gain a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from core.progress import track


@dataclass(frozen=True, kw_only=True)
class ProjectionRecipe:
    epochs: int = 25
    batch: int = 512
    """Pairs per step; all others are negatives unless their texts are equal."""
    lr: float = 1e-3
    text_lr: float = 0.3
    """Learning rate of the text map, relative to ``lr``."""
    weight_decay: float = 0.1
    warmup_steps: int = 50
    dropout: float = 0.3
    """On image features, which are redundant."""
    class_weight: float = 0.3
    """Weight of the ImageNet term; 0 disables it."""
    class_batch: int = 256
    class_noise: float = 0.5
    """Spread of sampled class features, in standard deviations of the real ones."""
    start_scale: float = 20.0
    max_scale: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    images: torch.Tensor
    """``float32 [n, image width]``."""
    texts: torch.Tensor
    """``float32 [m, text width]``, one row per distinct text."""
    text_of: torch.Tensor
    """``int64 [n]``: each image's row in ``texts``."""


@dataclass(frozen=True)
class Classes:
    head: torch.Tensor
    """``float32 [classes, image width]``; the bias does not shift means."""
    names: torch.Tensor
    """``float32 [classes, text width]``."""


@dataclass(frozen=True)
class Projections:
    image: torch.Tensor
    """``float32 [dim, image width]``."""
    text: torch.Tensor
    """``float32 [dim, text width]``."""
    logit_scale: torch.Tensor
    """Natural logarithm of the factor from cosine to logit; scalar."""
    losses: Sequence[float]


def train_projections(
    pairs: Pairs, classes: Classes | None = None, recipe: ProjectionRecipe | None = None
) -> Projections:
    """Train both maps with a contrastive loss in which equal texts are all positives. Deterministic for a seed."""
    how = recipe or ProjectionRecipe()
    generator = torch.Generator().manual_seed(how.seed)
    width, dim = pairs.images.shape[1], pairs.texts.shape[1]
    image = nn.Parameter(torch.empty(dim, width).uniform_(-(width**-0.5), width**-0.5, generator=generator))
    text = nn.Parameter(torch.eye(dim))
    scale = nn.Parameter(torch.tensor(math.log(how.start_scale)))
    groups: list[dict[str, Any]] = [
        {"params": [image]},
        {"params": [text], "lr": how.lr * how.text_lr},
        {"params": [scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.lr, weight_decay=how.weight_decay)
    count = len(pairs.images)
    size = min(how.batch, count)
    steps = how.epochs * (count // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / how.warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))),
    )
    drawn = _ClassFeatures(pairs.images, classes, how, generator) if classes and how.class_weight else None

    def image_vectors(features: torch.Tensor) -> torch.Tensor:
        keep = (torch.rand(features.shape, generator=generator) >= how.dropout).float() / (1 - how.dropout)
        return functional.normalize(features * keep @ image.T, dim=-1)

    def text_vectors(features: torch.Tensor) -> torch.Tensor:
        return functional.normalize(features @ text.T, dim=-1)

    losses = []
    for _ in track(range(how.epochs), "training projections", total=how.epochs):
        order = torch.randperm(count, generator=generator)
        total = 0.0
        for start in range(0, count - size + 1, size):
            rows = order[start : start + size]
            where = pairs.text_of[rows]
            logits = scale.exp() * image_vectors(pairs.images[rows]) @ text_vectors(pairs.texts[where]).T
            loss = multi_positive_loss(logits, where)
            if drawn is not None and classes is not None:
                features, which = drawn.draw()
                logits = scale.exp() * image_vectors(features) @ text_vectors(classes.names).T
                loss = loss + how.class_weight * functional.cross_entropy(logits, which)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                scale.clamp_(max=math.log(how.max_scale))
            total += float(loss.detach())
        losses.append(total / max(1, count // size))
    return Projections(image.detach(), text.detach(), scale.detach(), losses)


def multi_positive_loss(logits: torch.Tensor, text_of: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of both directions of ``[n, n]`` logits; pairs of equal text share the target mass."""
    same = (text_of[:, None] == text_of[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    rows = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    columns = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (rows + columns) / 2


class _ClassFeatures:
    """Samples image features of classes from the classifier's weights and the covariance of real features."""

    def __init__(self, real: torch.Tensor, classes: Classes, how: ProjectionRecipe, generator: torch.Generator) -> None:
        covariance = torch.cov(real.T)
        ridge = torch.eye(real.shape[1]) * covariance.diagonal().mean()
        towards = (classes.head - classes.head.mean(dim=0)) @ (0.9 * covariance + 0.1 * ridge)
        # All classes as far from the centre as real features, whatever the classifier's temperature.
        radius = real.std(dim=0).norm()
        self.means = real.mean(dim=0) + towards * (radius / towards.norm(dim=1, keepdim=True))
        self.spread = how.class_noise * torch.linalg.cholesky(covariance + 1e-3 * ridge)
        self.count, self.generator = how.class_batch, generator

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``float32 [k, width]`` and classes ``int64 [k]``; pooled ReLU6 features are never negative."""
        which = torch.randint(len(self.means), (self.count,), generator=self.generator)
        noise = torch.randn(self.count, self.means.shape[1], generator=self.generator) @ self.spread.T
        return (self.means[which] + noise).clamp(min=0), which
