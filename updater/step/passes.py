"""Passes of the model over a batch: precision, micro-batches, sharing among processes, and conflicting gradients.

Passes run in float32, or in mixed precision (Micikevicius et al. 2018) by torch's autocast where the processor
multiplies bfloat16 fast: only products are in bfloat16. Weights, trained parameters, gradients, optimizer state,
features, logits and losses stay float32. bfloat16 has float32's range, so losses need no scaling. Each process of a
team has the whole model, and computes a part of every batch. Processes exchange the model's outputs, each computes the
loss of the whole batch, and they exchange the gradients of the parameters.
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

from serving.engines.clip_base import ClipBase
from serving.engines.precision import SMALL_BYTES
from serving.engines.processor import processor
from serving.engines.vlm.vlm_base import VlmBase
from updater.methods.batches import Features
from updater.recipes import Part, Recipe, TrainPrecision

T = TypeVar("T")
ONE_FILE_SYSTEM: Final = "Processes that train one update need one file system for home."
NEW: tuple[Part, ...] = ("new",)
Run = Callable[[Sequence[int]], Tensor]
"""Outputs of some rows, [n, ...], in the order of the rows; a row may have several."""


def training_precision(recipe: Recipe, base: ClipBase | VlmBase, device: torch.device) -> TrainPrecision:
    """The recipe's precision. ``auto`` is bfloat16 on a processor that multiplies it fast, except for a small base,
    where products are a small part of a pass, as in serving."""
    if recipe.precision != "auto":
        return recipe.precision
    fast = processor(device.type).multiplies_bfloat16_fast
    return "bfloat16" if fast and base.weights_bytes >= SMALL_BYTES else "float32"


@contextmanager
def computing(precision: TrainPrecision, device: torch.device) -> Iterator[None]:
    """Run passes in this precision inside the context. Outputs may be bfloat16; callers convert them to float32."""
    if precision == "float32":
        yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused inference attention does not support autocast on a CPU
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Team:
    """This process alone. In a larger team all processes call each method, in the same order."""

    rank = 0
    size = 1

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def join(self, own: Tensor) -> tuple[Tensor, int]:
        """Rows [n, ...] of all processes in rank order, without gradients, and the index of the first own row."""
        return own, 0

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each parameter's gradient by the sum over all processes, bitwise equal everywhere."""

    def agree(self, value: T) -> T:
        """The first process's value."""
        return value

    def total(self, value: float) -> float:
        """Sum over all processes, the same in each."""
        return value

    def wait(self) -> None:
        """Barrier for all processes."""


ALONE = Team()


class TorchTeam(Team):
    """torch's default process group, which must exist. Tensors are on one device of each process."""

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
        """Added in rank order, so that a resumed run computes the same."""
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
    output: Tensor
    first: int


class CachedPasses:
    """Runs a model over rows in micro-batches of ``size`` with the gradient of the whole batch; 0 runs all of a
    process's rows at once. The processes of a :class:`Team` divide a batch the same way: each runs its own rows, and
    receives all outputs.

    GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): a
    contrastive loss compares every row with every other, so it cannot be summed over micro-batches, but it depends only
    on the model's outputs. Outputs of all rows are computed without a graph; the loss gives the gradient of each
    output; then each micro-batch runs again with its graph and propagates these gradients. This costs one more forward
    pass.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.team = ALONE
        self._open: list[_Pass] = []

    def __call__(self, run: Run, rows: Sequence[int]) -> Tensor:
        """Return the outputs of ``run`` for all rows. With gradients, call :meth:`backward` after that of the loss."""
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
        return output.view_as(output)  # a view: a saved leaf would be taken for a parameter, and not counted

    def drop(self) -> None:
        self._open.clear()

    def backward(self, after: Callable[[], None] = lambda: None) -> None:
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
    """Set ``grad`` to the sum of the terms' gradients, each projected off those that it conflicts with. If ``g_i . g_j
    < 0``, ``g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j`` (gradient surgery, Yu et al. 2020), in the order of the terms, so
    that the result is deterministic."""
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
    """Agreement of each row's gradient with those of the other rows: cosines [n] in [-1, 1].

    Row i's gradient is that of ``loss`` with respect to a linear map W right after each tower, z + W (z - mean z), at W
    = 0: the outer product of g_i, the gradient with respect to the row's feature z_i (tangential to the sphere), with
    c_i = z_i - mean z. Two rows agree by (g_i . g_j) (c_i . c_j), summed over towers: if similar inputs are pulled in
    opposite directions, one of them has the wrong partner. Without subtracting the mean, all features of a tower would
    be similar: they lie in a narrow cone.
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
    """Rows without the new ones that conflict most with the others: at most ``share`` of the new rows, rounded down."""
    new = batch.rows(NEW)
    agrees = agreement(loss, batch).tolist()
    worst = sorted(new, key=lambda row: agrees[row])[: int(share * len(new))]
    dropped = {row for row in worst if agrees[row] < 0}
    return [row for row in range(len(batch.part)) if row not in dropped]
