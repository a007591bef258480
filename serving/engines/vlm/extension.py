"""Changes vLLM's workers on a CPU: LoRA by groups of rows. Loaded inside the worker process (``worker_extension_cls``).
vLLM's CPU code copies both matrices for every row and uses the *last* slot for rows without an adapter (index -1). Here
each slot is applied once, only to its rows. With an untied output layer, vLLM's LoRA code for that layer crashes the
engine on requests for prompt log-probabilities; no adapter here has that layer, so it is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serving.engines.vlm.vllm_start import ZERO_ID

Group = tuple[int, torch.Tensor | None]
"""A slot and the rows that use it; None for all rows."""


class RowMaskExtension:
    """Mixed into vLLM's worker class. Importing this module patches the CPU backend."""


def groups_of(ids: Sequence[int], slots: Sequence[int | None]) -> list[Group]:
    """Group rows by slot. ``ids``: each row's adapter, 0 for none; ``slots``: the adapter in each slot."""
    requested = set(ids)
    used = sorted(requested - {0, ZERO_ID})
    if not used:
        return []
    if len(requested) == len(used) == 1:
        return [(slots.index(used[0]), None)]
    rows = torch.tensor(ids)
    return [(slots.index(one), torch.nonzero(rows == one).flatten()) for one in used]


def update_metadata(
    self: Any, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
) -> None:
    """vLLM's method, which also stores the row groups of this step."""
    _update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
    self.row_groups = groups_of(mapping.index_mapping, lora_index_to_id)


def add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **kwargs: Any,
) -> None:
    """``y[rows] += scale * B A x[rows]`` in place, for each group and each slice of a merged layer. ``y`` [rows, out],
    ``x`` [rows, in]; the stacks are [slots, 1, rank, in] and [slots, 1, out, rank]."""
    for slot, rows in self.row_groups:
        own = x if rows is None else x[rows]
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            inner = F.linear(own, a[slot, 0])
            part = y[:, start : start + width]
            if rows is None:
                part.addmm_(inner, b[slot, 0].t(), alpha=scale)
            else:
                part.index_add_(0, rows, F.linear(inner, b[slot, 0]), alpha=scale)
            start += width


def add_lora_logits(self: Any, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``y`` unchanged: no adapter has the output layer, see :func:`serving.engines.vlm.vlm_base.find_vlm_targets`."""
    return y


_update_metadata = PunicaWrapperCPU.update_metadata
PunicaWrapperCPU.update_metadata = update_metadata
PunicaWrapperCPU.add_lora_linear = add_lora_linear
PunicaWrapperCPU.add_lora_logits = add_lora_logits
