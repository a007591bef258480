from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import ConfigError
from serving.engines import torch_backend
from serving.engines.backends import EngineChoice, golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.preprocess import Preprocess
from serving.engines.torch_backend import ConvertedWeights, TorchBackend
from tests.support.tiny import tiny_adapter

HALF = [EngineChoice("torch", "bfloat16"), EngineChoice("torch", "float16")]
TEXTS = ["a cat", "seven words of a middling long text", "red"]
PIXELS = golden_pixels(32)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((one * other).sum(axis=1))


@pytest.mark.parametrize("choice", HALF, ids=str)
def test_half_precision_gives_the_vectors_of_float32_within_its_rounding(
    base: ClipBase, folder: Path, choice: EngineChoice
) -> None:
    plain, half = ClipEngine(base, "cpu"), ClipEngine(base, "cpu", choice=choice)
    name = tiny_adapter(base, folder, seed=1)
    for engine in (plain, half):
        engine.load(name, folder)
    assert half.spaces(name) == plain.spaces(name)  # what is indexed stays comparable
    for adapter in (None, name):
        images, texts = half.encode_images(PIXELS, adapter), half.encode_texts(TEXTS, adapter)
        assert images.dtype == texts.dtype == np.float32
        assert cosines(images, plain.encode_images(PIXELS, adapter)).min() > 0.999
        assert cosines(texts, plain.encode_texts(TEXTS, adapter)).min() > 0.999
    assert cosines(half.encode_images(PIXELS), half.encode_images(PIXELS, name)).min() < 0.99


def test_loading_an_adapter_at_half_precision_leaves_the_base_and_others_alone(base: ClipBase, tmp_path: Path) -> None:
    engine = ClipEngine(base, "cpu", choice=HALF[0])
    first, second = (tiny_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    engine.load(first, tmp_path / "1")
    expected = [engine.encode_images(PIXELS, name) for name in (None, first)]
    engine.load(second, tmp_path / "2")
    for name, vectors in zip((None, first), expected, strict=True):
        assert np.array_equal(engine.encode_images(PIXELS, name), vectors)
    assert not np.array_equal(engine.encode_images(PIXELS, second), expected[1])


def test_the_gate_compares_the_float32_model_of_a_half_precision_engine(base: ClipBase, folder: Path) -> None:
    plain, half = ClipEngine(base, "cpu"), ClipEngine(base, "cpu", choice=HALF[0])
    name = tiny_adapter(base, folder, seed=1)
    for engine in (plain, half):
        engine.load(name, folder)
    for adapter in (None, name):
        theirs = half.model(adapter).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in plain.model(adapter).state_dict().items())


def test_a_convolutional_tower_stays_float32_on_a_processor_and_texts_are_halved() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
            self.text = nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 16))

        def encode_image(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.visual(batch).flatten(1))

    model = Clip().eval()
    towers = TorchBackend(model, Preprocess(size=8), torch.device("cpu"), "bfloat16").towers({})
    shell = towers._passes.module
    assert {parameter.dtype for parameter in shell.get_submodule("visual").parameters()} == {torch.float32}
    assert shell.get_submodule("text.0").weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_weight_of_the_base_is_converted_once() -> None:
    weights = ConvertedWeights(torch.bfloat16, torch.device("cpu"))
    weight, unused, other = torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
    assert weights.take(weight) is weights.take(weight)
    assert weights.convert_like(unused, other) == {}
    own = weights.convert_like(weight, other)
    assert own.keys() == {"plain"}
    replaced = weights.replaced({weight: own})
    assert replaced.take(weight) is own["plain"]
    assert replaced.take(unused).dtype == torch.bfloat16
    assert weights.take(weight).sum() == 0


def test_batches_of_any_size_run_on_a_few_fixed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[int, ...]] = []

    class EagerStep:
        """Runs on fixed buffers, as a captured graph does."""

        def __init__(self, forward: Any, example: torch.Tensor) -> None:
            captured.append(tuple(example.shape))
            self.forward, self.inputs = forward, example

        def run(self, batch: torch.Tensor) -> Any:
            self.inputs[: len(batch)] = batch
            return self.forward(self.inputs)

    monkeypatch.setattr(torch_backend, "CudaStep", EagerStep)
    tower = torch_backend.GraphedTower(lambda batch: batch.float() * 2, torch.device("cpu"))
    for count in (3, 1, 8, 4, 7):
        batch = torch.arange(count * 5).reshape(count, 5)
        assert torch.equal(tower(batch), batch.float() * 2)
    assert captured == [(4, 5), (1, 5), (8, 5)]


def test_onnx_that_is_not_installed_is_named(base: ClipBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="ONNX Runtime is not installed"):
        ClipEngine(base, "cpu", choice=EngineChoice("onnx"))
