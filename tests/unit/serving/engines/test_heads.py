from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.errors import AdapterError
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.heads import HEADS, backed_off, heads_digest, read_heads, write_heads
from tests.support.heads import random_head
from tests.support.tiny import tiny_adapter, tiny_base

DIM = 6


def test_answers_are_those_of_gaussians_with_one_covariance() -> None:
    made = random_head(DIM)
    x = np.random.default_rng(1).normal(size=(4, DIM))
    answers = made.classify(x)
    for row, point in enumerate(x):
        distances = [float((point - m) @ made.precision @ (point - m)) for m in [*made.means, made.center]]
        likelihoods = [float(np.exp(-0.5 * made.scale * d)) for d in distances]
        assert answers.probabilities[row] == pytest.approx(
            [v / sum(likelihoods[:3]) for v in likelihoods[:3]], rel=1e-4
        )
        alone = [v / (v + likelihoods[3]) for v in likelihoods[:3]]
        assert answers.alone[row] == pytest.approx(alone, rel=1e-4)
        assert answers.distance[row] == pytest.approx(min(distances[:3]) / 9.0, rel=1e-4)


def test_a_label_that_is_a_path_backs_off_to_the_level_that_is_sure() -> None:
    labels, shares = ["bird/crane", "bird/gull", "birdcage", "fish/cod"], [0.5, 0.25, 0.2, 0.05]
    assert backed_off(labels, shares, 0.0) == ("bird/crane", 0.5)
    assert backed_off(labels, shares, 0.6) == ("bird", 0.75)
    assert backed_off(labels, shares, 0.8) == (None, 0.0)
    assert backed_off(["plain", "other"], [0.4, 0.6], 0.5) == ("other", 0.6)


def test_heads_come_back_as_they_were_written(tmp_path: Path) -> None:
    heads = {"one": random_head(DIM), "two": random_head(DIM, seed=2)}
    write_heads(tmp_path, heads)
    again = read_heads(tmp_path)
    assert again.keys() == heads.keys() and heads_digest(again) == heads_digest(heads)
    assert heads_digest({"one": random_head(DIM)}) != heads_digest({"two": random_head(DIM)}) != heads_digest({})
    assert heads_digest({"one": replace(random_head(DIM), threshold=8.0)}) != heads_digest({"one": random_head(DIM)})
    assert read_heads(tmp_path / "nothing") == {}


def _changed(path: Path, **arrays: np.ndarray) -> None:
    about = json.dumps({"one": random_head(DIM).about})
    save_file({**load_file(path), **arrays}, path, metadata={"heads": about})


@pytest.mark.parametrize(
    "arrays",
    [
        {"one/means": np.full((3, DIM), np.nan, np.float32)},
        {"one/means": np.zeros((2, DIM), np.float32)},
        {"one/precision": np.zeros((DIM, DIM + 1), np.float32)},
        {"one/center": np.zeros(DIM, np.float64)},
        {"other": np.zeros(3, np.float32)},
    ],
)
def test_a_damaged_file_of_heads_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_heads(tmp_path, {"one": random_head(DIM)})
    _changed(tmp_path / HEADS, **arrays)
    with pytest.raises(AdapterError, match="head"):
        read_heads(tmp_path)
    (tmp_path / HEADS).write_bytes(b"no heads")
    with pytest.raises(AdapterError, match="holds no heads"):
        read_heads(tmp_path)


def test_a_head_is_a_part_of_its_adapter_whose_name_it_is_in(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    plain = tiny_adapter(base, tmp_path / "plain", seed=1)
    files = read_adapter(tmp_path / "plain")
    heads = {"things": random_head(base.dim)}
    name = write_adapter(tmp_path / "headed", files.tensors, files.config, base, heads)
    assert name != plain and read_adapter(tmp_path / "headed").name == name
    engine = ClipEngine(base, "cpu")
    engine.load(plain, tmp_path / "plain")
    engine.load(name, tmp_path / "headed")
    assert engine.heads(plain) == engine.heads(None) == {} and list(engine.heads(name)) == ["things"]
    assert engine.spaces(plain) == engine.spaces(name)  # nothing is embedded again
    other = {"things": random_head(base.dim + 1)}
    odd = write_adapter(tmp_path / "odd", files.tensors, files.config, base, other)
    with pytest.raises(AdapterError, match="dimensions"):
        engine.load(odd, tmp_path / "odd")
    (tmp_path / "headed" / HEADS).unlink()
    with pytest.raises(AdapterError, match="damaged or were changed"):
        read_adapter(tmp_path / "headed")
