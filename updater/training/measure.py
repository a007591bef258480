"""What training costs, counted and not guessed: FLOPs of the real step, and its peak memory.

Memory is counted in one way for the step and for full fine-tuning, on a CPU and on a GPU: weights, gradients and
optimizer state of what learns, and the most that autograd keeps at once for the backward pass. No allocator is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from updater import optimizers
from updater.budget.bound import Costs
from updater.budget.cost import Cost
from updater.budget.flops import counted
from updater.budget.peak_memory import peak_saved_bytes, replaced_weights
from updater.data.pools import Example
from updater.step.learner import AnyLearner

SMALL, LARGE = 2, 4
"""Batches at which full fine-tuning is measured, on a CPU; its activations grow by the row, the rest is fixed."""
STRETCH = 8
"""Tokens by which a batch is lengthened that has the longest text of all."""


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
    known = Costs()

    def counted_at(length: int) -> float:
        with counted() as flops, learner.padded(length - own):
            learner.backward(rows)
            known.add(learner.size(rows), flops.gflops)
        return flops.gflops

    with peak_saved_bytes(model) as peak:
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
    trained = sum(_bytes(p) + optimizers.state_bytes(optimizer, p) for p in learner.parameters.values())
    twice = sum(_bytes(p) for kind in replaced_weights(model) for p in kind.parameters())
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
        known=known.to_json(),
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
    with counted() as flops, peak_saved_bytes(model) as peak:
        learner.plain(model, examples)
    return peak(), flops.gflops / len(examples)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
