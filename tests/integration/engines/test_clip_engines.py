"""ONNX Runtime as the CLIP's engine, on a tiny base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.engines.backends import EngineChoice, golden_pixels
from serving.engines.clip import ClipEngine
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
