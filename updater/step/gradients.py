"""Gradients of a batch: of one that is larger than memory, and of terms or rows that pull against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from updater.methods.batches import Features
from updater.recipes import Part
from updater.step.team import ALONE

NEW: tuple[Part, ...] = ("new",)
Run = Callable[[Sequence[int]], Tensor]
"""Outputs of some rows, [n, ...], in the order of the rows; a row may have several."""


def harmonized_backward(terms: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """Put into ``grad`` the sum of the terms' gradients, each projected off those that it conflicts with.

    Where ``g_i . g_j < 0``, ``g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j`` (gradient surgery, Yu et al. 2020), in the order
    of the terms, so that the result is a function of them alone.
    """
    gradients = [_flat(term, parameters) for term in terms]
    whole = torch.zeros_like(gradients[0])
    for number, gradient in enumerate(gradients):
        own = gradient.clone()
        for other in gradients[:number] + gradients[number + 1 :]:
            against = torch.dot(own, other)
            if against < 0:
                own -= against / other.square().sum() * other
        whole += own
    offset = 0
    for parameter in parameters:
        parameter.grad = whole[offset : offset + parameter.numel()].view_as(parameter).clone()
        offset += parameter.numel()


def _flat(term: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


def agreement(loss: Tensor, batch: Features) -> Tensor:
    """How far each row's gradient points where those of the other rows do: cosines [n] in [-1, 1].

    Row i's gradient is that of ``loss`` with respect to a linear map W right after each tower, z + W (z - mean z), at
    W = 0: the outer product of g_i, the gradient with respect to the row's feature z_i (tangential to the sphere), with
    c_i = z_i - mean z. Two rows agree by (g_i . g_j) (c_i . c_j), summed over towers: where alike inputs are pulled in
    opposite directions, one of them has the wrong partner. The row itself does not count among the others. Without the
    mean taken off, all features of a tower would be alike: they lie in a narrow cone.
    """
    sides = [side for side in (batch.image, batch.text) if side.requires_grad]
    products = loss.new_zeros(len(batch.part), len(batch.part), dtype=torch.float64)
    for side, gradient in zip(sides, torch.autograd.grad(loss, sides, retain_graph=True), strict=True):
        z = side.detach().double()
        g = gradient - (gradient * z).sum(dim=1, keepdim=True) * z
        centred = z - z.mean(dim=0)
        products += (g @ g.T) * (centred @ centred.T)
    own, whole = products.diagonal(), products.sum(dim=1)
    others = (products.sum() - 2 * whole + own).clamp(min=0)  # squared norm of the sum over the other rows
    size = (own * others).sqrt()
    return torch.where(size > 0, (whole - own) / size, 0.0).clamp(-1, 1)


def without_conflicts(loss: Tensor, batch: Features, share: float) -> list[int]:
    """Rows without those new ones that conflict most with the others: at most a share of them, rounded down."""
    new = batch.rows(NEW)
    agrees = agreement(loss, batch).tolist()
    worst = sorted(new, key=lambda row: agrees[row])[: int(share * len(new))]
    dropped = {row for row in worst if agrees[row] < 0}
    return [row for row in range(len(batch.part)) if row not in dropped]


@dataclass(frozen=True)
class _Pass:
    run: Callable[[], Tensor]
    """Gives outputs of some rows, with a graph."""
    output: Tensor
    """Of all rows."""
    first: int
    """Where the outputs of these rows begin in it."""


class CachedPasses:
    """Runs a model over rows in micro-batches of ``size``, with the same gradient as of the whole batch at once; with
    0, over all of a process's at once.

    GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a
    contrastive loss compares every row with every other, so it cannot be summed over micro-batches. But it sees of a
    row only the model's output. Outputs of all rows are computed without a graph; the loss gives the gradient of each
    output; then each micro-batch runs again with its graph, and its outputs pass their gradients on. One forward pass
    more, and the memory of one micro-batch.

    Several processes (:mod:`team`) divide a batch the same way: each runs its own rows, and has the outputs of all.
    """

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
