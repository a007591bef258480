"""Logit-swap distillation of answers: a token is learned with the least change of what the teacher thinks of others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from updater.methods.batches import AnswerBatch, Teacher, divergence
from updater.methods.objectives import VlmObjective, known_teacher


class SwappedTokenDistillation(VlmObjective):
    """KL(teacher' || student) at each token of the known answer; of teacher', the answer's token is the most probable.

    Where the teacher expects another token, the probabilities of the two change places, and all others keep theirs
    (logit swap self-distillation, Mix-CPT, Jiang et al. 2024).

    Args:
        teacher: ``base``, or ``incumbent``: the adapter with which the update begins; the base where there is none.
    """

    def __init__(self, teacher: str = "incumbent") -> None:
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        teacher = swapped(batch.teacher_distributions(self.teacher_of), batch.target)
        return batch.mean_over_rows(divergence(teacher, batch.logits))


def swapped(teacher: Teacher, target: Tensor) -> Teacher:
    """The teacher with ``target`` int [t] most probable. Exact also where it kept no probability of that token: the
    token that was first then joins the rest, with the probability that the target had in it."""
    first = teacher.tokens[:, :1]
    tokens = torch.where(teacher.tokens == target[:, None], first, teacher.tokens)
    tokens = torch.cat([target[:, None], tokens[:, 1:]], dim=1)
    return replace(teacher, tokens=tokens)
