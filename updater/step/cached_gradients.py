"""Gradients of a batch that is larger than memory, in micro-batches: the same gradient as of the whole batch at once.

GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a contrastive
loss compares every row with every other, so it cannot be summed over micro-batches. But it sees of a row only the
model's output. Outputs of all rows are computed without a graph; the loss gives the gradient of each output; then each
micro-batch runs again with its graph, and its outputs pass their gradients on. One forward pass more, and the memory of
one micro-batch.

Several processes (:mod:`team`) divide a batch the same way: each runs its own rows, and has the outputs of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from updater.step.team import ALONE

Run = Callable[[Sequence[int]], Tensor]
"""Outputs of some rows, [n, ...], in the order of the rows; a row may have several."""


@dataclass(frozen=True)
class _Pass:
    run: Callable[[], Tensor]
    """Gives outputs of some rows, with a graph."""
    output: Tensor
    """Of all rows."""
    first: int
    """Where the outputs of these rows begin in it."""


class CachedPasses:
    """Runs a model over rows in micro-batches of ``size``; with 0, over all of a process's at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.team = ALONE
        self._open: list[_Pass] = []

    def __call__(self, run: Run, rows: Sequence[int]) -> Tensor:
        """What ``run`` gives of all rows. With gradients, :meth:`backward` has to follow the loss's own."""
        shared = 1 < self.team.size <= len(rows)
        mine = self.team.share(rows) if shared else rows
        size = self.size or len(mine)
        if not shared and len(mine) <= size:
            return run(mine)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        whole = len(parts) == 1  # then its graph is kept, and nothing runs twice
        with torch.set_grad_enabled(torch.is_grad_enabled() and whole):
            outputs = [run(part) for part in parts]
        detached = torch.cat([output.detach() for output in outputs])
        output, first = self.team.join(detached) if shared else (detached, 0)
        if not torch.is_grad_enabled():
            return output
        output.requires_grad_()
        for part, own in zip(parts, outputs, strict=True):
            again = partial(_same, own) if whole else partial(run, part)
            self._open.append(_Pass(again, output, first))
            first += len(own)
        return output.view_as(output)  # of a leaf, what the loss keeps would be taken for a parameter and not counted

    def drop(self) -> None:
        """Forget passes whose loss had no backward pass."""
        self._open.clear()

    def backward(self, after: Callable[[], None] = lambda: None) -> None:
        """Pass the gradients of the outputs on into the parameters; ``after`` is called after each micro-batch."""
        while self._open:
            each = self._open.pop()
            gradient = each.output.grad
            if gradient is not None:
                output = each.run()
                torch.autograd.backward(output, gradient[each.first : each.first + len(output)])
                after()


def _same(output: Tensor) -> Tensor:
    return output
