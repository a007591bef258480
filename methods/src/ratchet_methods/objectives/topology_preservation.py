"""Topology preservation: keep the neighbourhoods of samples, between the towers and within each."""

from __future__ import annotations

import torch
from torch import Tensor

from ratchet_methods.objectives.divergence import row_divergence
from updater.methods.batches import Features
from updater.methods.objectives import ClipObjective, known_teacher, positive


class TopologyPreservation(ClipObjective):
    """``1/2 (KL_i2t + KL_t2i) + 1/2 (KL_i2i + KL_t2t)`` against the old model (CTP, Zhu et al. 2023). Each KL compares
    a row's softmax over the batch, the teacher's with the student's. Within a tower a row is not compared with itself,
    which is always nearest."""

    def __init__(self, temperature: float = 0.07, teacher: str = "incumbent") -> None:
        positive(temperature=temperature)
        self.temperature = temperature
        self.teacher: str = known_teacher(teacher)

    def __call__(self, batch: Features) -> Tensor:
        """Mean over rows, in nats; 0 if nothing moved, or everything was rotated alike."""
        teacher = batch.teachers[self.teacher]
        itself = torch.eye(len(batch.part), dtype=torch.bool, device=batch.image.device)
        across = teacher.image @ teacher.text.T, batch.image @ batch.text.T
        between = self._kl(*across) + self._kl(across[0].T, across[1].T)
        within = self._kl(teacher.image @ teacher.image.T, batch.image @ batch.image.T, itself)
        within = within + self._kl(teacher.text @ teacher.text.T, batch.text @ batch.text.T, itself)
        return 0.5 * between + 0.5 * within

    def _kl(self, old: Tensor, new: Tensor, masked: Tensor | None = None) -> Tensor:
        return row_divergence(old / self.temperature, new / self.temperature, masked).mean()
