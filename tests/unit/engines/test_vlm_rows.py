"""LoRA on a CPU by groups of rows: each row gets the delta of its own adapter, and a row without one gets none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from serving.engines.vlm import extension
from serving.engines.vlm.vllm_start import ZERO_ID

SLOTS = [7, None, ZERO_ID, 9]
WIDTHS = (6, 3)


class _Wrapper:
    def __init__(self, ids: list[int]) -> None:
        self.row_groups = extension.groups_of(ids, SLOTS)


def _added(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the extension adds for rows of these adapters, and what each row's own matrices add."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), 5, generator=made)
    a = tuple(torch.randn(len(SLOTS), 1, 2, 5, generator=made) for _ in WIDTHS)
    b = tuple(torch.randn(len(SLOTS), 1, width, 2, generator=made) for width in WIDTHS)
    before = torch.randn(len(ids), sum(WIDTHS), generator=made)
    y = before.clone()
    extension.add_lora_linear(_Wrapper(ids), y, x, a, b, 0.5, WIDTHS)
    wanted = torch.zeros_like(before)
    for row, one in enumerate(ids):
        if one not in (0, ZERO_ID):
            slot = SLOTS.index(one)
            wanted[row] = torch.cat([0.5 * (b[i][slot, 0] @ (a[i][slot, 0] @ x[row])) for i in range(len(WIDTHS))])
    return y - before, wanted


@pytest.mark.parametrize("ids", [[7, 7, 7], [9, 0, 7, 7, 0, 9], [0, 9], [0, 0], [ZERO_ID, 7], [ZERO_ID], [9, 7]])
def test_each_row_gets_the_delta_of_its_own_adapter(ids: list[int]) -> None:
    added, wanted = _added(ids)
    torch.testing.assert_close(added, wanted)
    assert bool(wanted.any()) == bool(set(ids) - {0, ZERO_ID})


def test_vllms_cpu_backend_uses_it() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    assert PunicaWrapperCPU.add_lora_linear is extension.add_lora_linear
    wrapper = PunicaWrapperCPU(16, 4, "cpu")
    from vllm.lora.layers import LoRAMapping

    wrapper.update_metadata(LoRAMapping((9, 9, 0, 7), (9, 0, 7), is_prefill=True), SLOTS, len(SLOTS) + 1, 32)
    assert [(slot, rows.tolist()) for slot, rows in wrapper.row_groups] == [(0, [3]), (3, [0, 1])]


def test_an_output_layer_of_its_own_takes_no_adapter_and_no_rows_of_the_batch() -> None:
    """vLLM's own code ends the engine when log-probabilities of a prompt are asked for: more rows than requests."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    logits, hidden = torch.randn(38, 11), torch.randn(38, 4)
    wrapper = PunicaWrapperCPU(64, 4, "cpu")
    changed = wrapper.add_lora_logits(logits, hidden, torch.zeros(4, 1, 8, 4), torch.zeros(4, 1, 11, 8), 1.0)
    assert changed is logits
