"""What training costs, counted and not guessed: FLOPs of the real step, and its peak memory.

Memory-adjusted FLOPs (MAF) as in FoMo-in-Flux, "A Practitioner's Guide to Continual Multimodal Pretraining":
GFLOPs x (peak memory / peak memory of full fine-tuning at the same batch). A multiply-add counts 2.

Memory is counted in one way for both, on a CPU and on a GPU: weights, gradients and optimizer state of what learns, and
the most that autograd keeps at once for the backward pass. No allocator is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from ops.errors import BudgetError
from updater import optimizers
from updater.adapters.kinds import Kind
from updater.learner import AnyLearner
from updater.pools import Example

SMALL, LARGE = 2, 4
"""Batches at which full fine-tuning is measured, on a CPU; its activations grow by the row, the rest is fixed."""


@dataclass(frozen=True)
class Cost:
    """Measured once per update, and kept with it, so that a resumed update plans the same number of steps."""

    step_gflops: float
    """Forward and backward of one batch, on average."""
    sample_gflops: float
    """Forward pass of one sample through the whole model."""
    prepare_gflops: float
    """All that is computed before the first step: teachers' passes, and what no step changes."""
    peak_bytes: float
    full_bytes: float
    """Peak of full fine-tuning at the same batch."""
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

    @property
    def maf_prepare(self) -> float:
        """Memory-adjusted GFLOPs before the first step."""
        return self.prepare_gflops * self.memory_ratio

    def maf(self, steps: int) -> float:
        """Memory-adjusted GFLOPs of an update of so many steps, and of what comes before and after them."""
        return self.maf_prepare + (steps + self.closing) * self.maf_per_step

    def steps_within(self, gflops: float, most: int) -> int:
        """Steps that a budget pays for, at most ``most``. Raises BudgetError when it pays for none."""
        affordable = int((gflops - self.maf_prepare) / self.maf_per_step) - self.closing if self.maf_per_step else most
        if affordable < 1:
            closing = f", {self.closing} such passes at the end" if self.closing else ""
            raise BudgetError(
                f"a budget of {gflops:,.0f} MAF-GFLOPs does not pay for one step "
                f"(teacher passes {self.maf_prepare:,.0f}, a step {self.maf_per_step:,.1f}{closing}).",
                "Raise budget.gflops_per_update, or use a recipe with a smaller batch or fewer reference pairs.",
            )
        return min(affordable, most)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(learner: AnyLearner, examples: list[Example], batches: Sequence[list[int]], prepare_gflops: float) -> Cost:
    """Count real steps (nothing is learned by them), and a small step of full fine-tuning.

    ``batches`` are the first ones that will be learned. A batch costs what its longest text makes it cost: the one with
    the shortest and the one with the longest are counted, and what lies between is linear.
    """
    model, optimizer = learner.model.model, learner.optimizer
    lengths = [max(learner.length(row) for row in rows) for rows in batches]
    least, most = min(lengths), max(lengths)
    rows = batches[lengths.index(most)]
    with counted() as flops, _peak(model) as peak:
        learner.backward(rows)
    step = long = flops.get_total_flops() / 1e9
    if least < most:
        with counted() as flops:
            learner.backward(batches[lengths.index(least)])
        short = flops.get_total_flops() / 1e9
        step = short + (long - short) * (sum(lengths) / len(lengths) - least) / (most - least)
    optimizer.zero_grad(set_to_none=True)
    trained = sum(_bytes(p) + optimizers.state_bytes(optimizer, p) for p in learner.parameters.values())
    twice = sum(_bytes(p) for kind in _in_place(model) for p in kind.parameters())
    weights = sum(_bytes(p) for p in model.parameters()) - twice
    small, sample_gflops = _full(learner, examples[:SMALL])
    large, _ = _full(learner, (examples * LARGE)[:LARGE])
    plain = learner.base.build_model()
    everything = sum(_bytes(p) for p in plain.parameters())
    per_row = (large - small) / (LARGE - SMALL)
    return Cost(
        step_gflops=step,
        sample_gflops=sample_gflops,
        prepare_gflops=prepare_gflops,
        # Gradient and optimizer state of what learns, beside weights and what autograd keeps.
        peak_bytes=weights + trained + peak(),
        full_bytes=everything * 4 + small + per_row * (len(rows) - SMALL),
        closing=sum(regularizer.passes for _, regularizer in learner.regularizers),
    )


def _full(learner: AnyLearner, examples: list[Example]) -> tuple[float, float]:
    """Bytes that autograd keeps for a step of full fine-tuning, and GFLOPs of one forward pass of one sample."""
    model = learner.base.build_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with counted() as flops, _peak(model) as peak:
        learner.plain(model, examples)
    return peak(), flops.get_total_flops() / 1e9 / len(examples)


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch's counter, that sees all attention: the CPU's kernel, which it does not know, is told it, and the fused
    layers of inference, of which it knows nothing, are switched off. Nor does it count the weights' gradient of a
    depthwise convolution as one of all channels with all channels.
    """
    aten = torch.ops.aten
    told = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.convolution_backward: _convolution_backward,
    }
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=told) as flops:
            yield flops
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _convolution_backward(grad: Any, inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of inputs and of weights, each as much as the forward pass, whatever the groups."""
    _, _, _, _, transposed, _, _, wanted = rest
    return int(conv_flop_count(inputs, weight, grad, transposed=transposed)) * sum(map(bool, wanted[:2]))


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
