"""Measured cost of training: FLOPs of a real step, and its peak memory. Memory is counted in the same way for the step
and for full fine-tuning, on CPU and GPU: weights, gradients and optimizer state of trained parameters, and the most
that autograd keeps at once for the backward pass, without asking an allocator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from updater.budget.bound import Costs
from updater.budget.cost import Cost
from updater.budget.flops import counted
from updater.data.pools import Example
from updater.methods import optimizers
from updater.step.learner import AnyLearner

SMALL, LARGE = 2, 4
"""Batch sizes for measuring full fine-tuning, on a CPU; activations grow by the row, the rest is fixed."""
STRETCH = 8
"""Extra tokens for a batch that already has the longest text."""


def measure(learner: AnyLearner, examples: Sequence[Example], batches: Sequence[list[int]]) -> Cost:
    """Count the first step (without learning), its preparation, and a small step of full fine-tuning. The cost of a
    batch is a polynomial of second degree in its longest text (attention): the first batch is counted at three lengths,
    by padding. The other ``batches`` only contribute their lengths; their rows are not prepared."""
    model, replaced, optimizer, rows = learner.model.model, learner.model.replaced, learner.optimizer, batches[0]
    learner.ready(rows)
    lengths = [max(learner.length(row) for row in batch) for batch in batches]
    own, most = lengths[0], max(lengths)
    known = Costs()

    def counted_at(length: int) -> float:
        with counted() as flops, learner.padded(length - own):
            learner.forward_backward(rows)
            known.add(learner.size(rows), flops.gflops)
        return flops.gflops

    with peak_saved_bytes(model, replaced) as peak:
        costs = {most: counted_at(most)}
    if min(lengths) < most:
        others = {own, (own + most) // 2} if own < most else {own + STRETCH, own + 2 * STRETCH}
        for length in sorted(others - {most}):
            if length <= learner.longest:
                costs[length] = counted_at(length)
    if learner.answers_itself:
        known = Costs()
        with learner.dearest():
            counted_at(own)
    step = _mean_cost(costs, lengths)
    optimizer.zero_grad(set_to_none=True)
    trained = sum(p.nbytes + optimizers.state_bytes(optimizer, p) for p in learner.parameters.values())
    twice = sum(p.nbytes for kind in replaced for p in kind.parameters())
    weights = sum(p.nbytes for p in model.parameters()) - twice
    small, sample_gflops = _full(learner, examples[:SMALL])
    large, _ = _full(learner, (list(examples[:LARGE]) * LARGE)[:LARGE])
    plain = learner.base.build_model()
    everything = sum(p.nbytes for p in plain.parameters())
    per_row = (large - small) / (LARGE - SMALL)
    return Cost(
        step_gflops=step,
        sample_gflops=sample_gflops,
        row_gflops=learner.row_gflops(rows),
        texts_gflops=learner.texts_gflops(),
        # Gradient and optimizer state of trained parameters, in addition to weights and what autograd keeps.
        peak_bytes=weights + trained + peak(),
        full_bytes=everything * 4 + small + per_row * (len(rows) - SMALL),
        row_bytes=learner.row_bytes(),
        closing=sum(regularizer.passes for _, regularizer in learner.regularizers),
        known=known.to_json(),
    )


def _mean_cost(costs: Mapping[int, float], lengths: Sequence[int]) -> float:
    """Mean over batches of some lengths, by the polynomial through the counted costs."""
    known = np.array(list(costs), float)
    fitted = np.polynomial.Polynomial.fit(known, list(costs.values()), len(costs) - 1)
    return float(np.mean(fitted(np.array(lengths, float)))) if len(costs) > 1 else next(iter(costs.values()))


def _full(learner: AnyLearner, examples: Sequence[Example]) -> tuple[float, float]:
    """Bytes that autograd keeps for a step of full fine-tuning, and GFLOPs of one forward pass of one sample."""
    model = learner.base.build_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with counted() as flops, peak_saved_bytes(model) as peak:
        learner.plain(model, examples)
    return peak(), flops.gflops / len(examples)


class _SavedBytes:
    """Bytes that autograd keeps for backward passes, current and peak. A storage counts once, until all its uses are
    released. Parameters and excluded tensors do not count."""

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._users: Counter[int] = Counter()
        self._excluded: dict[int, Tensor] = {}  # held, since a freed storage's address may be used again

    def exclude(self, tensor: Tensor) -> None:
        self._excluded[_address(tensor)] = tensor.detach()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        parameter = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        return tensor if parameter or _address(tensor) in self._excluded else _Saved(tensor, self)

    def add(self, tensor: Tensor) -> None:
        self._users[_address(tensor)] += 1
        if self._users[_address(tensor)] == 1:
            self._now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self._now)

    def remove(self, tensor: Tensor) -> None:
        self._users[_address(tensor)] -= 1
        if not self._users[_address(tensor)]:
            self._now -= tensor.untyped_storage().nbytes()


class _Saved:
    def __init__(self, tensor: Tensor, saved_bytes: _SavedBytes) -> None:
        self.tensor, self._saved_bytes = tensor, saved_bytes
        saved_bytes.add(tensor)

    def __del__(self) -> None:
        self._saved_bytes.remove(self.tensor)


class _AttentionExtras(TorchDispatchMode):
    """Excludes secondary outputs of attention kernels: softmax normalisers, seeds, paddings. They are small, and differ
    between CPU and GPU kernels."""

    def __init__(self, saved_bytes: _SavedBytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved_bytes = saved_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
            for extra in output[1:]:
                if isinstance(extra, Tensor):
                    self._saved_bytes.exclude(extra)
        return output


@contextmanager
def peak_saved_bytes(model: nn.Module, replaced: Sequence[nn.Module] = ()) -> Iterator[Callable[[], float]]:
    """Peak bytes kept for backward passes inside the context, counted equally on every device. An allocator's figure
    would include temporary buffers, caches and rounding, which no CPU reports and which depend on the GPU, so ratios
    would mean nothing. Weights formed by ``replaced`` modules count like parameters."""
    saved_bytes = _SavedBytes()
    for parameter in model.parameters():  # layers save views of them: a linear layer its transpose
        saved_bytes.exclude(parameter)
    hooks = [kind.register_forward_hook(lambda _, __, weight: saved_bytes.exclude(weight)) for kind in replaced]

    def unpack(saved: Tensor | _Saved) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    try:
        with saved_tensors_hooks(saved_bytes.pack, unpack), _AttentionExtras(saved_bytes):
            yield lambda: float(saved_bytes.most)
    finally:
        for hook in hooks:
            hook.remove()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
