"""Gradients of a batch that is larger than memory, in micro-batches: the same gradient as of the whole batch at once.

GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a contrastive
loss compares every row with every other, so it cannot be summed over micro-batches. But it sees of a row only the
model's output. Outputs of all rows are computed without a graph; the loss gives the gradient of each output; then each
micro-batch runs again with its graph, and its outputs pass their gradients on. One forward pass more, and the memory of
one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[Sequence[int]], Tensor]
"""Outputs of some rows, [n, ...], in the order of the rows; a row may have several."""


@dataclass(frozen=True)
class _Pass:
    run: Run
    rows: Sequence[int]
    output: Tensor
    first: int
    """Where the outputs of these rows begin in ``output``."""


class CachedPasses:
    """Runs a model over rows in micro-batches of ``size``; with 0, over all of them at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._open: list[_Pass] = []

    def __call__(self, run: Run, rows: Sequence[int]) -> Tensor:
        """What ``run`` gives of all rows. With gradients, :meth:`backward` has to follow the loss's own."""
        if not self.size or len(rows) <= self.size:
            return run(rows)
        parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        with torch.no_grad():
            outputs = [run(part) for part in parts]
        output = torch.cat(outputs)
        if not torch.is_grad_enabled():
            return output
        output.requires_grad_()
        first = 0
        for part, own in zip(parts, outputs, strict=True):
            self._open.append(_Pass(run, part, output, first))
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
                output = each.run(each.rows)
                torch.autograd.backward(output, gradient[each.first : each.first + len(output)])
                after()
