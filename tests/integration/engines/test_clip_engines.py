"""ONNX Runtime as the CLIP's engine, and the measurement of this machine, on a tiny base."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from core.loading import load_settings
from ops.cli.main import app
from ops.cli.tune import is_tuned
from serving.engines.backends import EngineChoice, golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.onnx_backend import PLUGIN, _openvino_device
from tests.support.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.integration

TEXTS = ["a cat", "seven words of a middling long text", "red", "word " * 60]
PIXELS = golden_pixels(32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def onnx(base: ClipBase) -> ClipEngine:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return ClipEngine(base, "cpu", choice=EngineChoice("onnx"))


@pytest.mark.parametrize("towers", [("image", "text"), ("text",)])
def test_onnx_gives_the_vectors_of_torch_for_the_base_and_for_adapters(
    onnx: ClipEngine, tmp_path: Path, towers: tuple[str, ...]
) -> None:
    plain = ClipEngine(onnx.base, "cpu")
    name = tiny_adapter(onnx.base, tmp_path / "a", seed=len(towers), towers=towers)
    for engine in (plain, onnx):
        engine.load(name, tmp_path / "a")
    for adapter in (None, name):
        np.testing.assert_allclose(onnx.encode_images(PIXELS, adapter), plain.encode_images(PIXELS, adapter), atol=1e-4)
        np.testing.assert_allclose(onnx.encode_texts(TEXTS, adapter), plain.encode_texts(TEXTS, adapter), atol=1e-4)
    assert np.abs(onnx.encode_texts(TEXTS, name) - onnx.encode_texts(TEXTS)).max() > 1e-2
    onnx.unload(name)


def test_a_graph_is_exported_once(onnx: ClipEngine) -> None:
    folder = onnx.base.directory.parent.parent / "engines"
    graphs = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.onnx")}
    assert len(graphs) == 2
    assert max(path.stat().st_size for path in folder.glob("*.onnx")) < 1 << 20  # without weights
    ClipEngine(onnx.base, "cpu", choice=EngineChoice("onnx"))
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.onnx")} == graphs


def test_openvinos_plugin_is_registered_once_where_it_knows_no_processor() -> None:
    """On a processor that the plugin does not know (such as an AMD), a second engine failed with "already
    registered".
    """
    registered: list[str] = []

    class Runtime:
        OrtHardwareDeviceType = SimpleNamespace(CPU="cpu")

        def get_ep_devices(self) -> list[object]:
            return []

        def register_execution_provider_library(self, name: str, path: str) -> None:
            assert name not in registered
            registered.append(name)

    runtime = Runtime()
    assert [_openvino_device(runtime) for _ in range(2)] == [None, None]
    assert registered == [PLUGIN]


@pytest.mark.long
def test_doctor_tune_measures_this_machine_and_writes_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.engines import tuning

    base = tiny_base(tmp_path)
    config = tmp_path / "ratchet.yaml"
    config.write_text(yaml.safe_dump({"home": str(tmp_path), "base": {"clip": base.name}, "serve": {"port": 9000}}))
    assert not is_tuned(load_settings(config, environ={}))
    monkeypatch.setattr(tuning, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(tuning, "layouts_of", lambda cores: [tuning.Layout(1, cores)])  # each process imports for 8 s
    result = CliRunner().invoke(app, ["--config", str(config), "doctor", "--tune"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    settings = load_settings(config, environ={})
    assert is_tuned(settings)
    assert settings.serve.port == 9000
    assert settings.serve.engine in ("torch", "onnx")
    assert settings.serve.precision != "auto"
    assert settings.serve.encoder_replicas * settings.serve.encoder_threads >= 1
    for shown in ("Engines", "Encoders", "serve.encoder_threads", str(config)):
        assert shown in result.output
