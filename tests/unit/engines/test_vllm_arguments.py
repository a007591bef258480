"""What vLLM is started with: the settings' own arguments are checked by name before it is."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from core.errors import ConfigError
from core.settings.serving import Serve
from serving.engines.vlm.vllm_start import engine_arguments
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.tiny_vlm import tiny_vlm_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("home"))


def test_arguments_of_the_settings_are_passed_on(base: VlmBase) -> None:
    more = {"seed": 7, "kv_cache_dtype": "fp8", "quantization": "fp8"}
    assert engine_arguments(base, Serve(vlm_arguments=more)).items() >= more.items()
    assert engine_arguments(base, Serve()).keys().isdisjoint({"seed", "quantization"})


@pytest.mark.parametrize("name", ["enable_lora", "model", "max_model_len", "worker_extension_cls"])
def test_what_ratchet_sets_itself_is_refused(base: VlmBase, name: str) -> None:
    with pytest.raises(ConfigError, match=f"serve.vlm_arguments.{name}: Ratchet sets it itself"):
        engine_arguments(base, Serve(vlm_arguments={name: 1}))


def test_a_name_that_vllm_does_not_know_is_refused_with_the_nearest(base: VlmBase) -> None:
    with pytest.raises(ConfigError, match="no such engine argument") as caught:
        engine_arguments(base, Serve(vlm_arguments={"kv_cache_dtyp": 2}))
    assert caught.value.fix == "Did you mean kv_cache_dtype?"
    with pytest.raises(ConfigError) as caught:
        engine_arguments(base, Serve(vlm_arguments={"zzz": 2}))
    assert "AsyncEngineArgs" in caught.value.fix


def test_on_gpus_a_replica_is_divided_over_as_many_as_it_has(base: VlmBase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensor_parallel_size" not in engine_arguments(base, Serve(vlm_gpus=4))  # on this CPU
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    arguments = engine_arguments(base, Serve(vlm_gpus=4))
    assert arguments["tensor_parallel_size"] == 4 and arguments["dtype"] == "auto"
    with pytest.raises(ConfigError, match="tensor_parallel_size: Ratchet sets it itself"):
        engine_arguments(base, Serve(vlm_arguments={"tensor_parallel_size": 2}))
