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
from serving.engines.onnx_backend import PLUGIN, _openvino_device
from tests.support.tiny import tiny_adapter, tiny_base

TEXTS = ["a cat", "seven words of a middling long text", "red", "word " * 60]
PIXELS = golden_pixels(32)


def test_onnx_gives_the_vectors_of_torch_and_exports_a_graph_once(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    base = tiny_base(tmp_path)
    plain, onnx = ClipEngine(base, "cpu"), ClipEngine(base, "cpu", choice=EngineChoice("onnx"))
    names: list[str | None] = [None]
    for towers in (("image", "text"), ("text",)):
        folder = tmp_path / "-".join(towers)
        names.append(tiny_adapter(base, folder, seed=len(towers), towers=towers))
        for engine in (plain, onnx):
            engine.load(str(names[-1]), folder)
    for adapter in names:
        np.testing.assert_allclose(onnx.encode_images(PIXELS, adapter), plain.encode_images(PIXELS, adapter), atol=1e-4)
        np.testing.assert_allclose(onnx.encode_texts(TEXTS, adapter), plain.encode_texts(TEXTS, adapter), atol=1e-4)
    assert np.abs(onnx.encode_texts(TEXTS, names[1]) - onnx.encode_texts(TEXTS)).max() > 1e-2

    folder = base.directory.parent.parent / "engines"
    graphs = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.onnx")}
    assert len(graphs) == 2
    assert max(path.stat().st_size for path in folder.glob("*.onnx")) < 1 << 20  # without weights
    ClipEngine(base, "cpu", choice=EngineChoice("onnx"))
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
    assert settings.serve.engine in ("torch", "onnx") and settings.serve.precision != "auto"
    assert settings.serve.encoder_replicas * settings.serve.encoder_threads >= 1
    for shown in ("Engines", "Encoders", "serve.encoder_threads", str(config)):
        assert shown in result.output
