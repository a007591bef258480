"""On-policy self-distillation: answer as the model would after reading the right answer."""

from __future__ import annotations

from torch import Tensor

from updater.methods.batches import AnswerBatch, mean_over_rows
from updater.methods.objectives import VlmObjective


class SelfDistillation(VlmObjective):
    """KL(student || teacher) at each token of an answer that the student has just generated.

    The teacher is a running mean of the student that sees the known answer as an example in its prompt (SDFT, Shenfeld
    et al. 2026, "Self-Distillation Enables Continual Learning"). It only works for models that can learn from an
    example in the prompt. ``keep``: share of itself that the teacher keeps at each step, 0 to 1.
    """

    own_answers = True

    def __init__(self, keep: float = 0.99) -> None:
        if not 0 <= keep <= 1:
            raise TypeError(f"keep is {keep}, not from 0 to 1")
        self.momentum = (keep, 1 - keep, 0.0)

    def __call__(self, batch: AnswerBatch) -> Tensor:
        """Mean over rows of the mean over a row's tokens, in nats."""
        if batch.own is None:
            return batch.zero()
        student, teacher = batch.own.logits.log_softmax(dim=1), batch.own.teacher.log_softmax(dim=1)
        divergence = (student.exp() * (student - teacher)).sum(dim=1)
        return mean_over_rows(divergence, batch.own.row, len(batch.part))
