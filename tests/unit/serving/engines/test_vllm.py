from __future__ import annotations

import pytest
import torch

from tests.support.tiny_vlm import tiny_vlm_base

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm import extension, vllm_start
from serving.engines.vlm.open import open_engine
from serving.engines.vlm.vllm_engine import VllmEngine
from serving.engines.vlm.vllm_start import ZERO_ID, engine_arguments
from serving.engines.vlm.vlm_base import VlmBase


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.getbasetemp() / "vllm")


def test_arguments_are_passed_on_and_what_ratchet_sets_or_nobody_knows_is_refused(base: VlmBase) -> None:
    more = {"seed": 7, "quantization": "fp8"}
    assert engine_arguments(base, Serve(vlm_arguments=more)).items() >= more.items()
    assert engine_arguments(base, Serve()).keys().isdisjoint(more)
    for name in ("enable_lora", "model", "max_model_len", "worker_extension_cls"):
        with pytest.raises(ConfigError, match=f"serve.vlm_arguments.{name}: Ratchet sets it itself"):
            engine_arguments(base, Serve(vlm_arguments={name: 1}))
    with pytest.raises(ConfigError, match="no such engine argument") as caught:
        engine_arguments(base, Serve(vlm_arguments={"kv_cache_dtyp": 2}))
    assert "such as kv_cache_dtype" in caught.value.fix


async def test_a_start_that_fails_leaves_no_cache_behind(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(base, Serve(), kind="vllm")
    spoilt = vllm_start.cache_folder(base) / "inductor" / "empty.so"
    spoilt.parent.mkdir(parents=True)
    spoilt.touch()

    def start(_: VllmEngine) -> None:
        raise ConfigError("vLLM does not start: file too short", "")

    monkeypatch.setattr(VllmEngine, "_start", start)
    with pytest.raises(ConfigError, match="file too short"):
        await engine.start()
    assert not vllm_start.cache_folder(base).exists()


SLOTS = [7, None, ZERO_ID, 9]


def test_vllms_cpu_backend_adds_adapters_by_it() -> None:
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
