from __future__ import annotations

import os

import pytest
import torch

from tests.support.tiny_vlm import tiny_vlm_base

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

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


def test_auto_is_vllm_where_it_is_installed(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((True, "vllm"), (False, "transformers")):
        monkeypatch.setattr("serving.engines.vlm.open.installed", lambda there=there: there)
        assert open_engine(base, Serve()).kind == kind
    assert open_engine(base, Serve(vlm_engine="transformers")).kind == "transformers"
    assert open_engine(base, Serve(vlm_engine="transformers"), kind="vllm").kind == "vllm"
    with pytest.raises(ConfigError, match="no VLM engine 'other'"):
        open_engine(base, Serve(), kind="other")


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


def test_on_gpus_a_replica_is_divided_over_as_many_as_it_has(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensor_parallel_size" not in engine_arguments(base, Serve(vlm_gpus=4))  # on this CPU
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    arguments = engine_arguments(base, Serve(vlm_gpus=4))
    assert arguments["tensor_parallel_size"] == 4 and arguments["dtype"] == "auto"
    with pytest.raises(ConfigError, match="tensor_parallel_size: Ratchet sets it itself"):
        engine_arguments(base, Serve(vlm_arguments={"tensor_parallel_size": 2}))


def test_there_is_a_slot_for_the_window_one_coming_one_going_and_the_base() -> None:
    assert vllm_start.slots_of(Serve(rollback_window=4)) == 7


def test_the_environment_of_the_engine_is_not_left_behind(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/fast/disk")
    with vllm_start.child_environment(base, Serve(vlm_threads=3)):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(vllm_start.cache_folder(base) / "inductor")
        assert os.environ["TRITON_CACHE_DIR"] == "/fast/disk", "an operator's own"
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert not {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CACHE_ROOT"} & os.environ.keys()


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("set_by_the_user", [None, "0"])
def test_dynamo_is_off_on_a_cpu_alone_whatever_the_environment_says(
    cpu: bool, set_by_the_user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")  # so that it is put back
    if set_by_the_user is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    else:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", set_by_the_user)
    vllm_start.import_vllm()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == ("1" if cpu else set_by_the_user)


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
