"""Logit-swap distillation of answers: learn a token with the least change to the teacher's other probabilities."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from updater.methods.batches import AnswerBatch, Teacher, divergence
from updater.methods.objectives import VlmObjective, known_teacher


class SwappedTokenDistillation(VlmObjective):
    """KL(teacher' || student) at each token of the known answer, which is the most probable one under teacher'. If the
    teacher expects another token, the probabilities of the two are exchanged, and all others stay (logit swap
    self-distillation, Mix-CPT, Jiang et al. 2024)."""

    def __init__(self, teacher: str = "incumbent") -> None:
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        teacher = swapped(batch.teacher_distributions(self.teacher_of), batch.target)
        return batch.mean_over_rows(divergence(teacher, batch.logits))


def swapped(teacher: Teacher, target: Tensor) -> Teacher:
    """Make ``target`` int [t] the most probable token of the teacher. Exact even if the teacher kept no probability of
    that token: the former first token then joins the rest, with the probability that the target had in it."""
    first = teacher.tokens[:, :1]
    tokens = torch.where(teacher.tokens == target[:, None], first, teacher.tokens)
    tokens = torch.cat([target[:, None], tokens[:, 1:]], dim=1)
    return replace(teacher, tokens=tokens)
