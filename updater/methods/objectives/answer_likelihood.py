"""Likelihood of the answer: the loss of a language model, on answers alone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from updater.methods.objectives.objective import Answers, Objective
from updater.recipes import Family


class AnswerLikelihood(Objective[Answers]):
    """Cross entropy of each answer token and of the answer's end; the question and the image are only read."""

    family: ClassVar[Family] = "vlm"

    def __call__(self, batch: Answers) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        return batch.mean_over_rows(F.cross_entropy(batch.logits, batch.target, reduction="none"))


TERM = AnswerLikelihood
