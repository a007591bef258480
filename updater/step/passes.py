"""Passes of the model over a batch: their precision, micro-batches, and processes that share them. Gradients of terms
or rows that pull against each other.

Passes run in float32, or in mixed precision (Micikevicius et al. 2018) by torch's autocast, where the processor
multiplies bfloat16 fast: only the products of a pass are in bfloat16. Weights, what learns, its gradients and optimizer
state stay float32, and so do the features, logits and losses that come of a pass. bfloat16 has float32's range, so that
no loss is scaled.

Each process of a team has the whole model, and computes a part of every batch. A loss that compares every row with
every other cannot be summed over parts of a batch, but it sees of a row only what the model makes of it
(:class:`CachedPasses`). So processes exchange these outputs, and each has the loss of the whole batch; then they
exchange the gradients of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import torch
from torch import Tensor, distributed, nn

from serving.engines.backends import processor
from serving.engines.clip_base import ClipBase
from serving.engines.engine_choice import SMALL_BYTES
from serving.engines.vlm.vlm_base import VlmBase
from updater.methods.batches import Features
from updater.recipes import Part, Recipe, TrainPrecision

T = TypeVar("T")
ONE_FILE_SYSTEM: Final = "Processes that train one update need one file system for home."
"""The remedy where one does not see what another has written."""
NEW: tuple[Part, ...] = ("new",)
Run = Callable[[Sequence[int]], Tensor]
"""Outputs of some rows, [n, ...], in the order of the rows; a row may have several."""


def training_precision(recipe: Recipe, base: ClipBase | VlmBase, device: torch.device) -> TrainPrecision:
    """The recipe's precision. ``auto`` is bfloat16 on a processor that multiplies it fast, but for a small base: there
    products are a small part of a pass, as in serving.
    """
    if recipe.precision != "auto":
        return recipe.precision
    fast = processor(device.type).multiplies_bfloat16_fast
    return "bfloat16" if fast and base.weights_bytes >= SMALL_BYTES else "float32"


@contextmanager
def computing(precision: TrainPrecision, device: torch.device) -> Iterator[None]:
    """Inside, passes run in this precision. Outputs may be bfloat16; their users make them float32."""
    if precision == "float32":
        yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused attention of inference knows no autocast on a CPU
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
        """The first process's value."""
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
        counts = [int(count) for count in self._gathered(torch.tensor([len(own)], device=own.device))]
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        raw = self._gathered(padded.view(torch.uint8).reshape(-1))  # as bytes: not every backend knows bfloat16
        parts = [part.view(own.dtype).reshape(padded.shape)[:count] for part, count in zip(raw, counts, strict=True)]
        return torch.cat(parts), sum(counts[: self.rank])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Added in the order of the ranks: a resumed run computes the same."""
        own = list(parameters)
        has = torch.tensor([parameter.grad is not None for parameter in own], dtype=torch.float32)
        gradients = [(p.new_zeros(p.shape) if p.grad is None else p.grad).detach().reshape(-1).float() for p in own]
        total = torch.stack(self._gathered(torch.cat([has.to(gradients[0].device), *gradients]))).sum(0)
        values = torch.split(total[len(own) :], [parameter.numel() for parameter in own])
        for parameter, count, value in zip(own, total[: len(own)].tolist(), values, strict=True):
            parameter.grad = value.reshape(parameter.shape).to(parameter.dtype) if count else None

    def agree(self, value: T) -> T:
        values: list[T] = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def total(self, value: float) -> float:
        values: list[float] = [0.0] * self.size
        distributed.all_gather_object(values, value)
        return math.fsum(values)

    def wait(self) -> None:
        distributed.barrier()

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own.contiguous())
        return parts


@dataclass(frozen=True)
class _Pass:
    run: Callable[[], Tensor]
    """Gives outputs of some rows, with a graph."""
    output: Tensor
    """Of all rows."""
    first: int
    """The place at which the outputs of these rows begin in it."""


class CachedPasses:
    """Runs a model over rows in micro-batches of ``size``, with the same gradient as of the whole batch at once; with
    0, over all of a process's at once.

    GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a
    contrastive loss compares every row with every other, so it cannot be summed over micro-batches. But it sees of a
    row only the model's output. Outputs of all rows are computed without a graph; the loss gives the gradient of each
    output; then each micro-batch runs again with its graph, and its outputs pass their gradients on. One forward pass
    more, and the memory of one micro-batch.

    Several processes (:class:`Team`) divide a batch the same way: each runs its own rows, and has the outputs of all.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.team = ALONE
        self._open: list[_Pass] = []

    def __call__(self, run: Run, rows: Sequence[int]) -> Tensor:
        """The outputs of ``run`` for all rows. With gradients, :meth:`backward` has to follow the loss's own."""
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
    """The agreement of each row's gradient with those of the other rows: cosines [n] in [-1, 1].

    Row i's gradient is that of ``loss`` with respect to a linear map W right after each tower, z + W (z - mean z), at
    W = 0: the outer product of g_i, the gradient with respect to the row's feature z_i (tangential to the sphere), with
    c_i = z_i - mean z. Two rows agree by (g_i . g_j) (c_i . c_j), summed over towers: where alike inputs are pulled in
    opposite directions, one of them has the wrong partner. The row itself does not count among the others. Without the
    mean taken off, all features of a tower would be alike: they lie in a narrow cone.
    """
    towers = [features for features in (batch.image, batch.text) if features.requires_grad]
    products = loss.new_zeros(len(batch.part), len(batch.part), dtype=torch.float64)
    for features, gradient in zip(towers, torch.autograd.grad(loss, towers, retain_graph=True), strict=True):
        z = features.detach().double()
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
