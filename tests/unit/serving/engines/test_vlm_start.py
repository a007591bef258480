from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.errors import AdapterError, ConfigError
from core.settings.serving import Serve
from serving.engines.vlm import vllm_start
from serving.engines.vlm.adapters import linear_shapes, parts_of, read_validated_adapter
from serving.engines.vlm.open import open_engine
from serving.engines.vlm.vllm_engine import VllmEngine
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base


def test_auto_is_vllm_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_vlm_base(tmp_path)
    for there, kind in ((True, "vllm"), (False, "transformers")):
        monkeypatch.setattr("serving.engines.vlm.open.installed", lambda there=there: there)
        assert open_engine(base, Serve()).kind == kind
    assert open_engine(base, Serve(vlm_engine="transformers")).kind == "transformers"
    assert open_engine(base, Serve(vlm_engine="transformers"), kind="vllm").kind == "vllm"
    with pytest.raises(ConfigError, match="no VLM engine 'other'"):
        open_engine(base, Serve(), kind="other")


def test_the_environment_of_the_engine_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/fast/disk")
    with vllm_start.child_environment(tiny_vlm_base(tmp_path), Serve(vlm_threads=3)):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "vllm" / "inductor")
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
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")  # so that it is put back
    if set_by_the_user is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    else:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", set_by_the_user)
    vllm_start.import_vllm()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == ("1" if cpu else set_by_the_user)


async def test_a_start_that_fails_leaves_no_cache_that_could_have_failed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tiny_vlm_base(tmp_path), Serve(), kind="vllm")
    spoilt = vllm_start.cache_folder(engine.base) / "inductor" / "empty.so"
    spoilt.parent.mkdir(parents=True)
    spoilt.touch()

    def start(_: VllmEngine) -> None:
        raise ConfigError("vLLM does not start: file too short", "")

    monkeypatch.setattr(VllmEngine, "_start", start)
    with pytest.raises(ConfigError, match="file too short"):
        await engine.start()
    assert not vllm_start.cache_folder(engine.base).exists()


def test_there_is_a_slot_for_the_window_one_coming_one_going_and_the_base() -> None:
    assert vllm_start.slots_of(Serve(rollback_window=4)) == 7


def test_an_adapter_is_read_only_when_it_fits(tmp_path: Path) -> None:
    base, other = tiny_vlm_base(tmp_path), tiny_vlm_base(tmp_path, "other", seed=1)
    shapes = linear_shapes(base)
    assert {base.part_of(name) for name in shapes} == {"text", "image", "connector"}
    name = tiny_vlm_adapter(base, tmp_path / "a", 1, parts=("text", "connector"), rank=8)
    files = read_validated_adapter(base, shapes, name, tmp_path / "a", 8)
    assert parts_of(base, files) == {"text", "connector"}
    with pytest.raises(AdapterError, match=r"has rank 8; this server takes 4"):
        read_validated_adapter(base, shapes, name, tmp_path / "a", 4)
    with pytest.raises(AdapterError, match="not vlm-other"):
        read_validated_adapter(base, shapes, "vlm-other", tmp_path / "a", 8)
    with pytest.raises(AdapterError, match="belongs to the base"):
        read_validated_adapter(other, linear_shapes(other), name, tmp_path / "a", 8)
    fewer = {key: shape for key, shape in shapes.items() if "connector" not in key}
    with pytest.raises(AdapterError, match=r"has no layer 'model\.connector"):
        read_validated_adapter(base, fewer, name, tmp_path / "a", 8)
    wider = {key: (shape[0], shape[1] + 1) for key, shape in shapes.items()}
    with pytest.raises(AdapterError, match="do not fit its weight"):
        read_validated_adapter(base, wider, name, tmp_path / "a", 8)
