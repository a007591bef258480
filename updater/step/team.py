"""The processes that train one model together. Each has the whole model, and computes a part of every batch.

A loss that compares every row with every other cannot be summed over parts of a batch, but it sees of a row only what
the model makes of it (see :mod:`cached_gradients`). So processes exchange these outputs, and each has the loss of the
whole batch; what they exchange next are the gradients of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")
ONE_FILE_SYSTEM: Final = "Processes that train one update need one file system for home."
"""What to do where one does not see what another has written."""


class Team:
    """This process alone. Every method of a larger one is called by all of its processes, in the same order."""

    rank = 0
    size = 1

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's part of some rows: consecutive ones."""
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def join(self, own: Tensor) -> tuple[Tensor, int]:
        """The rows [n, ...] of all processes in the order of their ranks, without gradients; where its own begin."""
        return own, 0

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum over all processes in place of each parameter's gradient; the same bits everywhere."""

    def agree(self, value: T) -> T:
        """What the first process says."""
        return value

    def total(self, value: float) -> float:
        """The sum over all processes, the same in each."""
        return value

    def wait(self) -> None:
        """Return when all processes have come here."""


ALONE = Team()


class TorchTeam(Team):
    """The default process group of torch, which has to be there. Tensors are on one device of each process."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def join(self, own: Tensor) -> tuple[Tensor, int]:
        """See :class:`Team`."""
        counts = [int(count) for count in self._gathered(torch.tensor([len(own)], device=own.device))]
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        raw = self._gathered(padded.view(torch.uint8).reshape(-1))  # as bytes: not every backend knows bfloat16
        parts = [part.view(own.dtype).reshape(padded.shape)[:count] for part, count in zip(raw, counts, strict=True)]
        return torch.cat(parts), sum(counts[: self.rank])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See :class:`Team`. Added in the order of the ranks: a resumed run computes the same."""
        own = list(parameters)
        has = torch.tensor([parameter.grad is not None for parameter in own], dtype=torch.float32)
        gradients = [(p.new_zeros(p.shape) if p.grad is None else p.grad).detach().reshape(-1).float() for p in own]
        total = torch.stack(self._gathered(torch.cat([has.to(gradients[0].device), *gradients]))).sum(0)
        values = torch.split(total[len(own) :], [parameter.numel() for parameter in own])
        for parameter, count, value in zip(own, total[: len(own)].tolist(), values, strict=True):
            parameter.grad = value.reshape(parameter.shape).to(parameter.dtype) if count else None

    def agree(self, value: T) -> T:
        """See :class:`Team`."""
        values: list[T] = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def total(self, value: float) -> float:
        """See :class:`Team`."""
        values: list[float] = [0.0] * self.size
        distributed.all_gather_object(values, value)
        return math.fsum(values)

    def wait(self) -> None:
        """See :class:`Team`."""
        distributed.barrier()

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own.contiguous())
        return parts
