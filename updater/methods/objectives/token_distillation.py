"""Token distillation: where the teacher had an opinion on the next token, the student keeps it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from updater.methods.objectives.objective import Answers, Objective, Teacher, known_teacher
from updater.recipes import Family


class TokenDistillation(Objective[Answers]):
    """KL(teacher || student) over the next token, at each token of the known answer (Hinton et al. 2015, at T = 1).

    The teacher is kept as its most probable tokens and one bucket for all others, which the student's others are
    compared with: a lower bound of the whole KL, and equal to it when every token is kept.

    Args:
        teacher: ``base``, or ``incumbent``: the adapter with which the update begins; the base where there is none.
        replay: the same for replayed rows, where they have another teacher. Held to the base, they are pulled back to
            what they were before they were learned.
    """

    family: ClassVar[Family] = "vlm"

    def __init__(self, teacher: str = "base", replay: str | None = None) -> None:
        self.teacher: str = known_teacher(teacher, "base", "incumbent")
        self.replay_teacher = known_teacher(replay, "base", "incumbent") if replay is not None else None

    def __call__(self, batch: Answers) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        return batch.mean_over_rows(divergence(batch.taught(self.teacher_of), batch.logits))


def summarise(logits: Tensor, k: int) -> Teacher:
    """The ``k`` most probable tokens of logits [t, vocabulary], and the rest as one."""
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
    return Teacher(top.indices, top.values, _others(logprobs, top.indices))


def divergence(teacher: Teacher, logits: Tensor) -> Tensor:
    """KL(teacher || student) at each token [t], from the student's logits [t, vocabulary]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, teacher.tokens)
    known = (teacher.logprobs.exp() * (teacher.logprobs - chosen)).sum(dim=1)
    if teacher.tokens.shape[1] == logits.shape[1]:
        return known
    return known + teacher.rest.exp() * (teacher.rest - _others(logprobs, teacher.tokens))


def _others(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of all tokens but these, together [t]; -inf when there are none."""
    if tokens.shape[1] == logprobs.shape[1]:
        return logprobs.new_full((len(logprobs),), -torch.inf)
    return logprobs.scatter(1, tokens, -torch.inf).logsumexp(dim=1)


TERM = TokenDistillation
