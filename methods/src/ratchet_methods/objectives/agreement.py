"""Contrast that believes a caption as far as the model before the update agrees with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective
from updater.recipes import Part

TEACHERS = ("base", "incumbent")


class AgreementContrast(ClipObjective):
    """The contrastive term (:class:`updater.methods.objectives.Contrastive`) with softer targets for new pairs that
    both the base and the incumbent find unlikely, as a wrong caption is.

    A pair's likelihood is the probability that a teacher gives its caption among those of the batch's new rows, and its
    image among theirs; the better of both teachers counts, so what only one of them knows is believed. Pairs are ranked
    within their domain, because a whole domain may be new. Of the lowest share ``doubtful``, the target is mixed with
    the better teacher's own distribution: almost wholly for the least likely one, not at all at the share's end (soft
    bootstrapping: Reed et al., "Training deep neural networks on noisy labels with bootstrapping", 2015).

    Args:
        doubtful: share of the new rows that are believed less, above 0 and at most 1.
    """

    def __init__(self, doubtful: float = 0.3) -> None:
        if not 0 < doubtful <= 1:
            raise TypeError(f"doubtful is {doubtful}, and must be above 0 and at most 1")
        self.doubtful = doubtful

    @property
    def teachers(self) -> tuple[str, ...]:
        return TEACHERS

    def teachers_of(self, part: Part) -> tuple[str, ...]:
        return TEACHERS if part == "new" else ()

    def __call__(self, batch: Features) -> Tensor:
        """Mean over both directions, in nats."""
        logits = batch.scale * batch.image @ batch.text.T
        by_image = by_text = batch.caption_targets
        if rows := batch.rows({"new"}):
            by_image, by_text = self._softened(batch, rows)
        return 0.5 * (F.cross_entropy(logits, by_image) + F.cross_entropy(logits.T, by_text))

    def _softened(self, batch: Features, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Targets of images and of texts, float32 [n, n]."""
        index = torch.tensor(rows, device=batch.image.device)
        new = batch.select(rows)
        believed, likelihoods = [], []
        for name in TEACHERS:
            teacher = new.teachers[name]
            logits = new.scale * teacher.image @ teacher.text.T
            both = torch.stack([logits.softmax(dim=1), logits.T.softmax(dim=1)])
            believed.append(both)
            likelihoods.append((both * new.same_caption).sum(dim=2).clamp_min(1e-12).log().mean(dim=0))
        likelihood, better = torch.stack(likelihoods).max(dim=0)
        trust = (self._quantiles(likelihood, new.domain) / self.doubtful).clamp(max=1.0)[:, None]
        chosen = torch.stack(believed)[better, :, torch.arange(len(rows), device=index.device)]  # [new, 2, new]
        targets = []
        for direction in range(2):
            target = batch.caption_targets.clone()
            soft = torch.zeros_like(target[index]).index_copy_(1, index, chosen[:, direction])
            target[index] = trust * target[index] + (1 - trust) * soft
            targets.append(target)
        return targets[0], targets[1]

    def _quantiles(self, likelihood: Tensor, domain: Tensor | None) -> Tensor:
        """Rank of each row among those of its domain, in (0, 1)."""
        group = torch.zeros_like(likelihood, dtype=torch.int64) if domain is None else domain
        same = group[:, None] == group[None, :]
        below = (same & (likelihood[None, :] < likelihood[:, None])).sum(dim=1)
        equal = (same & (likelihood[None, :] == likelihood[:, None])).sum(dim=1)
        return (below + equal / 2) / same.sum(dim=1)
