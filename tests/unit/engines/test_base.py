"""Bases are self-contained, checked, and the same model that open_clip builds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from core.errors import BaseModelError
from serving.engines.clip_base import ClipBase, base_directory, list_bases, load_base, save_base
from serving.engines.layers import SkipInit
from serving.engines.preprocess import Preprocess
from tests.support.tiny import CONFIG, tiny_base


def test_a_base_survives_a_move_of_its_directory(base: ClipBase, tmp_path: Path) -> None:
    shutil.copytree(base.directory, tmp_path / "bases" / "copy")
    moved = load_base(tmp_path, "copy")
    assert moved.digest == base.digest
    assert moved.spaces == base.spaces
    assert list_bases(tmp_path) == ["copy"]


def test_another_content_under_a_used_name_is_refused(base: ClipBase, tmp_path: Path) -> None:
    tiny_base(tmp_path, "x", seed=0)
    model = open_clip.model.CLIP(**CONFIG)
    with pytest.raises(BaseModelError, match="other content"):
        save_base(tmp_path, "x", model, CONFIG, Preprocess(size=32), {"kind": "simple", "kwargs": {}})
    assert load_base(tmp_path, "x").digest == base.digest
    assert list_bases(tmp_path) == ["x"]


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    base = tiny_base(tmp_path)
    weights = base.directory / "model.safetensors"
    if damage == "short":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        weights.unlink()
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        base.build_model()


def test_a_base_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="ratchet base build"):
        load_base(tmp_path, "shipped")


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 65])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BaseModelError, match="not a name"):
        base_directory(tmp_path, name)


def test_a_description_of_another_format_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    path = base.directory / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(BaseModelError, match="format 99"):
        load_base(tmp_path, base.name)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_open_clip(mode: Any, interpolation: Any) -> None:
    chance = np.random.default_rng(0)
    for size in [(50, 33), (20, 64), (32, 32), (24, 24), (9, 200), *chance.integers(8, 120, (30, 2)).tolist()]:
        image = Image.fromarray(chance.integers(0, 256, (*size, 3), dtype=np.uint8))
        ours = Preprocess(size=24, resize_mode=mode, interpolation=interpolation, fill_color=7)
        cfg = PreprocessCfg(size=24, resize_mode=mode, interpolation=interpolation, fill_color=7)
        theirs = image_transform_v2(cfg, is_train=False)(image)
        torch.testing.assert_close(ours.normalise(ours.pixels(image)[None])[0], theirs, rtol=0, atol=1e-5)


def test_what_only_prepares_images_does_not_import_open_clip(base: ClipBase) -> None:
    code = f"""
import sys
from pathlib import Path
from typing import Any
import serving.replicas.catalog, serving.http.ingress
from serving.engines.clip_base import load_base
load_base(Path({str(base.directory.parents[1])!r}), {base.name!r})
assert not {{"open_clip", "transformers", "torchvision"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preprocessing_survives_json() -> None:
    one = Preprocess(size=48, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), interpolation="bilinear")
    assert Preprocess.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Preprocess.from_json({"size": [48, 48], "mode": "RGB"}).size == 48
    with pytest.raises(BaseModelError, match="square"):
        Preprocess.from_json({"size": [48, 32]})
    with pytest.raises(BaseModelError, match="size"):
        Preprocess(size=0)


def test_a_space_is_weights_preprocessing_and_dimension(base: ClipBase) -> None:
    def spaces(**changes: Any) -> tuple[str, str]:
        found = replace(base, **changes).spaces
        return found.image, found.text

    image, text = spaces()
    moved = spaces(preprocess=Preprocess(size=33))
    assert moved[0] != image
    assert moved[1] == text
    assert spaces(context_length=8)[0] == image
    assert spaces(context_length=8)[1] != text
    both = spaces(dim=33)
    assert both[0] != image
    assert both[1] != text
    # Logit scale scales logits, no vectors.
    assert spaces(tensors=base.tensors | {"logit_scale": "0" * 64}) == (image, text)


def test_a_model_whose_weights_are_loaded_draws_no_random_ones(base: ClipBase) -> None:
    state = torch.get_rng_state()
    first, second = base.build_model(), base.build_model()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    for (name, one), (_, other) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_other_threads_and_later_models_draw_theirs() -> None:
    drawn = []
    with SkipInit():
        thread = threading.Thread(target=lambda: drawn.append(nn.Linear(64, 64).weight))
        thread.start()
        thread.join()
    drawn.append(nn.Linear(64, 64).weight)
    for weight in drawn:
        assert 0 < float(weight.abs().max()) <= 1 / 8  # kaiming_uniform_ of 64 inputs
