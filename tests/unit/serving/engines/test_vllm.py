from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm import extension
from serving.engines.vlm.vllm_start import ZERO_ID, engine_arguments
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny_vlm import tiny_vlm_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("home"))


def test_arguments_of_the_settings_are_passed_on(base: VlmBase) -> None:
    more = {"seed": 7, "quantization": "fp8"}
    assert engine_arguments(base, Serve(vlm_arguments=more)).items() >= more.items()
    assert engine_arguments(base, Serve()).keys().isdisjoint(more)


@pytest.mark.parametrize("name", ["enable_lora", "model", "max_model_len", "worker_extension_cls"])
def test_what_ratchet_sets_itself_is_refused(base: VlmBase, name: str) -> None:
    with pytest.raises(ConfigError, match=f"serve.vlm_arguments.{name}: Ratchet sets it itself"):
        engine_arguments(base, Serve(vlm_arguments={name: 1}))


def test_a_name_that_vllm_does_not_know_is_refused_with_the_nearest(base: VlmBase) -> None:
    with pytest.raises(ConfigError, match="no such engine argument") as caught:
        engine_arguments(base, Serve(vlm_arguments={"kv_cache_dtyp": 2}))
    assert "such as kv_cache_dtype" in caught.value.fix


def test_on_gpus_a_replica_is_divided_over_as_many_as_it_has(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensor_parallel_size" not in engine_arguments(base, Serve(vlm_gpus=4))  # on this CPU
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    arguments = engine_arguments(base, Serve(vlm_gpus=4))
    assert arguments["tensor_parallel_size"] == 4 and arguments["dtype"] == "auto"
    with pytest.raises(ConfigError, match="tensor_parallel_size: Ratchet sets it itself"):
        engine_arguments(base, Serve(vlm_arguments={"tensor_parallel_size": 2}))


SLOTS = [7, None, ZERO_ID, 9]
WIDTHS = (6, 3)


class _Wrapper:
    def __init__(self, ids: list[int]) -> None:
        self.row_groups = extension.groups_of(ids, SLOTS)


def _added(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The extension's output for rows of these adapters, and the sum of each row's own matrices."""
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
    assert PunicaWrapperCPU.add_lora_linear is extension.add_lora_linear
    wrapper = PunicaWrapperCPU(16, 4, "cpu")
    wrapper.update_metadata(LoRAMapping((9, 9, 0, 7), (9, 0, 7), is_prefill=True), SLOTS, len(SLOTS) + 1, 32)
    assert [(slot, rows.tolist()) for slot, rows in wrapper.row_groups] == [(0, [3]), (3, [0, 1])]


def test_an_output_layer_of_its_own_takes_no_adapter_and_no_rows_of_the_batch() -> None:
    """vLLM's own code ends the engine when log-probabilities of a prompt are asked for: more rows than requests."""
    logits, hidden = torch.randn(38, 11), torch.randn(38, 4)
    wrapper = PunicaWrapperCPU(64, 4, "cpu")
    changed = wrapper.add_lora_logits(logits, hidden, torch.zeros(4, 1, 8, 4), torch.zeros(4, 1, 11, 8), 1.0)
    assert changed is logits
