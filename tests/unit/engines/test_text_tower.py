"""Texts at the width that they need give the vectors of full length, where the tower allows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip.model
import pytest
import torch

from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, save_base
from serving.engines.preprocess import Preprocess
from serving.engines.towers import TextWidths
from tests.support.tiny import CONFIG, tiny_adapter

TEXTS = ["a", "a photo of a cat", "seven words of a middling long text", "word " * 60]


def custom(home: Path, **text_cfg: object) -> ClipBase:
    """A base with open_clip's separate text tower, as SigLIP and CLIPA have it."""
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text_cfg}, "custom_text": True}  # type: ignore[dict-item]
    torch.manual_seed(0)
    model = open_clip.model.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    return save_base(home, "custom", model, config, Preprocess(size=32), {"kind": "simple", "kwargs": {}})


def at_full_length(engine: ClipEngine, adapter: str | None) -> np.ndarray:
    with torch.inference_mode():
        vectors = engine.model(adapter).encode_text(engine.tokenizer(TEXTS), normalize=True)  # type: ignore[operator]
    return np.asarray(vectors)


def test_short_and_long_texts_of_a_causal_tower_have_the_vectors_of_full_length(base: ClipBase, folder: Path) -> None:
    engine = ClipEngine(base, device="cpu")
    name = tiny_adapter(base, folder, seed=1)
    engine.load(name, folder)
    for adapter in (None, name):
        np.testing.assert_allclose(engine.encode_texts(TEXTS, adapter), at_full_length(engine, adapter), atol=1e-5)


@pytest.mark.parametrize(
    ("text_cfg", "trims"),
    [({}, True), ({"no_causal_mask": True, "pool_type": "last"}, False), ({"no_causal_mask": True}, False)],
)
def test_a_tower_that_sees_its_padding_gets_full_length(
    tmp_path: Path, text_cfg: dict[str, object], trims: bool
) -> None:
    engine = ClipEngine(custom(tmp_path, **text_cfg), device="cpu")
    assert engine.widths.trims is trims
    np.testing.assert_allclose(engine.encode_texts(TEXTS), at_full_length(engine, None), atol=1e-5)


def test_short_texts_share_a_pass_and_do_not_pay_for_a_long_one() -> None:
    widths = TextWidths(77, trims=True, bucket=8)
    passes = list(widths.passes([10, 70, 12, 9, 20, 77], most=64))
    assert passes == [(24, [3, 0, 2, 4]), (77, [1, 5])]


def test_no_pass_has_more_rows_than_are_allowed() -> None:
    assert [len(indices) for _, indices in TextWidths(77, trims=True).passes([9] * 7, most=3)] == [3, 3, 1]
    assert list(TextWidths(77, trims=False).passes([9, 70], most=64)) == [(77, [0, 1])]
    assert list(TextWidths(77, trims=True).passes([], most=64)) == []
