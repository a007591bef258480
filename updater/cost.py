"""What training costs, counted and not guessed: FLOPs of the real step, and its peak memory.

Memory-adjusted FLOPs (MAF) as in FoMo-in-Flux, "A Practitioner's Guide to Continual Multimodal Pretraining":
GFLOPs x (peak memory / peak memory of full fine-tuning at the same batch).

Memory is counted in one way for both, on a CPU and on a GPU: weights, gradients and optimizer state of what learns, and
the most that autograd keeps at once for the backward pass. No allocator is asked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ops.errors import BudgetError
from updater import optimizers
from updater.adapters.kinds import Kind
from updater.flops import counted
from updater.learner import AnyLearner
from updater.mixture import BatchPlan
from updater.pools import Example
from updater.recipes import Part

SMALL, LARGE = 2, 4
"""Batches at which full fine-tuning is measured, on a CPU; its activations grow by the row, the rest is fixed."""
STRETCH = 8
"""Tokens by which a batch is lengthened that has the longest text of all."""


class StepUnaffordable(BudgetError):
    """A budget does not pay for one step. ``needed``: what would, in MAF-GFLOPs."""

    needed: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Measured once per update, on its first batch, and kept with it: a resumed update plans the same steps."""

    step_gflops: float
    """Forward and backward of one batch, on average."""
    sample_gflops: float
    """Forward pass of one sample through the whole model."""
    row_gflops: Mapping[Part, float]
    """What is computed once of an example, by its pool: teachers' passes, and what no step changes."""
    texts_gflops: float
    """The same of texts that are in every batch."""
    peak_bytes: float
    full_bytes: float
    """Peak of full fine-tuning at the same batch."""
    row_bytes: float = 0.0
    """Disk that is taken for an example, at most."""
    closing: int = 0
    """Steps' worth of passes after the last step: gradients that regularizers measure."""

    @property
    def memory_ratio(self) -> float:
        """Peak memory over that of full fine-tuning."""
        return self.peak_bytes / self.full_bytes

    @property
    def maf_per_step(self) -> float:
        """Memory-adjusted GFLOPs of a step."""
        return self.step_gflops * self.memory_ratio

    def maf(self, steps: int, prepared_gflops: float) -> float:
        """Memory-adjusted GFLOPs of an update of so many steps, for which so much was prepared."""
        return prepared_gflops * self.memory_ratio + (steps + self.closing) * self.maf_per_step

    def prepare_gflops(self, steps: int, plan: BatchPlan) -> float:
        """What is prepared for so many steps: the rows that they visit, and no others."""
        return self.texts_gflops + sum(self.row_gflops[part] * plan.visited(part, steps) for part in plan.counts)

    def planned(self, steps: int, plan: BatchPlan) -> float:
        """Memory-adjusted GFLOPs of so many steps and of preparing the rows that they visit."""
        return self.maf(steps, self.prepare_gflops(steps, plan))

    def steps_within(self, gflops: float, most: int, plan: BatchPlan) -> int:
        """Steps that a budget pays for with their own rows, at most ``most``.

        Raises StepUnaffordable when it does not pay for one.
        """
        if self.planned(1, plan) > gflops:
            raise self._unaffordable(gflops, plan)
        # The last number of steps that is within: the cost grows with each.
        return bisect_right(range(1, most + 1), gflops, key=lambda steps: self.planned(steps, plan))

    def _unaffordable(self, gflops: float, plan: BatchPlan) -> StepUnaffordable:
        needed = self.planned(1, plan)
        prepare = self.prepare_gflops(1, plan) * self.memory_ratio
        closing = f", {self.closing} such passes at the end" if self.closing else ""
        error = StepUnaffordable(
            f"a budget of {gflops:,.0f} MAF-GFLOPs does not pay for one step with its own rows, which costs "
            f"{needed:,.1f} (to prepare the rows {prepare:,.1f}, a step {self.maf_per_step:,.1f}{closing}).",
            "Raise budget.gflops_per_update and gflops_per_day, or use a recipe with a smaller batch.",
        )
        error.needed = needed
        return error

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(learner: AnyLearner, examples: Sequence[Example], batches: Sequence[list[int]]) -> Cost:
    """Count the first step (nothing is learned by it), what is prepared for it, and a small step of full fine-tuning.

    A batch costs what its longest text makes it cost, and that is a polynomial of second degree, by its attention: the
    first batch is counted at three lengths, by padding. ``batches`` are those whose lengths count; of the others than
    the first no row is prepared.
    """
    model, optimizer, rows = learner.model.model, learner.optimizer, batches[0]
    learner.ready(rows)
    lengths = [max(learner.length(row) for row in batch) for batch in batches]
    own, most = lengths[0], max(lengths)
    with counted() as flops, _peak(model) as peak, learner.padded(most - own):
        learner.backward(rows)
    costs = {most: flops.get_total_flops() / 1e9}
    if min(lengths) < most:
        others = {own, (own + most) // 2} if own < most else {own + STRETCH, own + 2 * STRETCH}
        for length in sorted(others - {most}):
            if length <= learner.longest:
                with counted() as flops, learner.padded(length - own):
                    learner.backward(rows)
                costs[length] = flops.get_total_flops() / 1e9
    step = _mean_cost(costs, lengths)
    optimizer.zero_grad(set_to_none=True)
    trained = sum(_bytes(p) + optimizers.state_bytes(optimizer, p) for p in learner.parameters.values())
    twice = sum(_bytes(p) for kind in _in_place(model) for p in kind.parameters())
    weights = sum(_bytes(p) for p in model.parameters()) - twice
    small, sample_gflops = _full(learner, examples[:SMALL])
    large, _ = _full(learner, (list(examples[:LARGE]) * LARGE)[:LARGE])
    plain = learner.base.build_model()
    everything = sum(_bytes(p) for p in plain.parameters())
    per_row = (large - small) / (LARGE - SMALL)
    return Cost(
        step_gflops=step,
        sample_gflops=sample_gflops,
        row_gflops=learner.row_gflops(rows),
        texts_gflops=learner.texts_gflops(),
        # Gradient and optimizer state of what learns, beside weights and what autograd keeps.
        peak_bytes=weights + trained + peak(),
        full_bytes=everything * 4 + small + per_row * (len(rows) - SMALL),
        row_bytes=learner.row_bytes(),
        closing=sum(regularizer.passes for _, regularizer in learner.regularizers),
    )


def _mean_cost(costs: Mapping[int, float], lengths: Sequence[int]) -> float:
    """Mean over batches of some lengths, by the polynomial through what was counted at others."""
    known = np.array(list(costs), float)
    fitted = np.polynomial.Polynomial.fit(known, list(costs.values()), len(costs) - 1)
    return float(np.mean(fitted(np.array(lengths, float)))) if len(costs) > 1 else next(iter(costs.values()))


def _full(learner: AnyLearner, examples: Sequence[Example]) -> tuple[float, float]:
    """Bytes that autograd keeps for a step of full fine-tuning, and GFLOPs of one forward pass of one sample."""
    model = learner.base.build_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with counted() as flops, _peak(model) as peak:
        learner.plain(model, examples)
    return peak(), flops.get_total_flops() / 1e9 / len(examples)


class _Kept:
    """Bytes that autograd keeps for backward passes, now and at most; a storage counts once, until nothing of it is
    kept. Parameters do not count, nor what is excluded.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._users: Counter[int] = Counter()
        self._excluded: dict[int, Tensor] = {}  # held, since a freed storage's address may be used again

    def exclude(self, tensor: Tensor) -> None:
        """Count nothing of this tensor's storage."""
        self._excluded[_address(tensor)] = tensor.detach()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        """The hook of a tensor that is saved."""
        parameter = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        return tensor if parameter or _address(tensor) in self._excluded else _Saved(tensor, self)

    def add(self, tensor: Tensor) -> None:
        """One more use of a storage."""
        self._users[_address(tensor)] += 1
        if self._users[_address(tensor)] == 1:
            self._now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self._now)

    def remove(self, tensor: Tensor) -> None:
        """One use less."""
        self._users[_address(tensor)] -= 1
        if not self._users[_address(tensor)]:
            self._now -= tensor.untyped_storage().nbytes()


class _Saved:
    """A saved tensor; autograd lets go of it when its node's backward pass is over."""

    def __init__(self, tensor: Tensor, kept: _Kept) -> None:
        self.tensor, self._kept = tensor, kept
        kept.add(tensor)

    def __del__(self) -> None:
        self._kept.remove(self.tensor)


class _AttentionExtras(TorchDispatchMode):
    """Excludes what an attention kernel returns beside its output: the normalisers of its softmax, seeds, paddings.

    They are small, and differ between the kernels of a CPU and of a GPU.
    """

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
            for extra in output[1:]:
                if isinstance(extra, Tensor):
                    self._kept.exclude(extra)
        return output


@contextmanager
def _peak(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Most bytes that are kept at once for backward passes inside, on every device by the same count.

    An allocator's figure would hold temporary buffers, caches and rounding, which no CPU reports, and which depend on
    the GPU: its ratio to what is counted elsewhere means nothing. Weights of the model that could stand where a
    parameter does count no more than parameters.
    """
    kept = _Kept()
    for parameter in model.parameters():  # of which layers save views: a linear layer its transpose
        kept.exclude(parameter)
    hooks = [kind.register_forward_hook(lambda _, __, weight: kept.exclude(weight)) for kind in _in_place(model)]
    try:
        with saved_tensors_hooks(kept.pack, _unpack), _AttentionExtras(kept):
            yield lambda: float(kept.most)
    finally:
        for hook in hooks:
            hook.remove()


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _in_place(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Kind) and module.in_place]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
