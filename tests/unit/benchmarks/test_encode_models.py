"""Peers get the same weights: the models that are written for them give the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizerFast

from benchmarks.encode.peers.hf_clip import hf_weights, write_hf_clip
from benchmarks.encode.peers.onnx_export import export_onnx
from core.errors import BaseModelError
from serving.engines.clip import ClipEngine, golden_pixels
from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_base

TEXTS = ["a photo of a cat", "two red birds, at night", "x" * 200]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


def test_a_hugging_face_model_of_a_base_gives_its_vectors(base: ClipBase, tmp_path: Path) -> None:
    folder = write_hf_clip(base, tmp_path / "hf")
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    pixels = golden_pixels(base.preprocess.size)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape[1] == base.context_length
    with torch.inference_mode():
        answer = model(**inputs, pixel_values=base.preprocess.normalise(pixels))
    engine = ClipEngine(base)
    assert np.allclose(answer.image_embeds, engine.encode_images(pixels), atol=1e-5)
    assert np.allclose(answer.text_embeds, engine.encode_texts(TEXTS), atol=1e-5)
    assert abs(answer.text_embeds - answer.text_embeds[:1]).max() > 0.01, "texts differ by more than the tolerance"


def test_a_weight_without_a_place_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"no place for 'visual.trunk.stem.weight'"):
        hf_weights({"visual.trunk.stem.weight": torch.zeros(1)})


def test_onnx_graphs_of_a_base_give_its_vectors(base: ClipBase, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizers = pytest.importorskip("tokenizers")
    folder = export_onnx(base, tmp_path / "onnx")
    engine, pixels = ClipEngine(base), golden_pixels(base.preprocess.size)
    [images] = onnxruntime.InferenceSession(str(folder / "image.onnx")).run(None, {"pixels": pixels[:3]})
    assert np.allclose(images, engine.encode_images(pixels[:3]), atol=1e-5)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(folder / "text.onnx"))
    for text in TEXTS[:2]:
        ids = np.zeros((1, base.context_length), np.int64)
        row = tokenizer.encode(text).ids
        ids[0, : len(row)] = row
        [vectors] = session.run(None, {"ids": ids})
        assert np.allclose(vectors, engine.encode_texts([text]), atol=1e-5)
