from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
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
from ratchet_client.images import decode_image, open_image
from serving.engines.clip_base import ClipBase, base_directory, list_bases, load_base, save_base
from serving.engines.layers import SkipInit
from serving.engines.preprocess import Preprocess, ResizeMode
from tests.support.tiny import CONFIG, tiny_base


def test_a_base_survives_a_move_and_other_content_under_its_name_is_refused(base: ClipBase, tmp_path: Path) -> None:
    shutil.copytree(base.directory, tmp_path / "bases" / "copy")
    moved = load_base(tmp_path, "copy")
    assert (moved.digest, moved.spaces) == (base.digest, base.spaces)
    with pytest.raises(BaseModelError, match="other content"):
        save_base(tmp_path, "copy", open_clip.model.CLIP(**CONFIG), CONFIG, Preprocess(size=32), {"kind": "simple"})
    assert load_base(tmp_path, "copy").digest == base.digest
    assert list_bases(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), r"model\.safetensors has 1000 bytes"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / "base.json").write_text('{"format": 99}'), "format 99"),
        (lambda folder: (folder / "base.json").write_text("[1"), "cannot be read"),
        (shutil.rmtree, "ratchet base build"),
    ],
)
def test_a_damaged_base_is_refused_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    base = tiny_base(tmp_path)
    damage(base.directory)
    with pytest.raises(BaseModelError, match=message):
        load_base(tmp_path, base.name).build_model()


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 65])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BaseModelError, match="not a name"):
        base_directory(tmp_path, name)


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
    def changed(**changes: Any) -> tuple[bool, bool]:
        found = replace(base, **changes).spaces
        return found.image != base.spaces.image, found.text != base.spaces.text

    assert changed(preprocess=Preprocess(size=33)) == (True, False)
    assert changed(context_length=8) == (False, True)
    assert changed(dim=33) == (True, True)
    assert changed(tensors=base.tensors | {"logit_scale": "0" * 64}) == (False, False), "it scales logits, no vectors"


def test_a_model_whose_weights_are_loaded_draws_no_random_ones(base: ClipBase) -> None:
    state = torch.get_rng_state()
    first, second = base.build_model(), base.build_model()
    assert torch.equal(torch.get_rng_state(), state)
    for values in (nn.Module.named_parameters, nn.Module.named_buffers):
        for (name, one), (_, other) in zip(values(first), values(second), strict=True):
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


def photo(width: int, height: int, kind: str = "JPEG", **options: object) -> bytes:
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / 7 + y / 29), np.sin(y / 11), np.where(x > width / 3, 1.0, -1.0) * np.cos(y / 50)]
    buffer = io.BytesIO()
    Image.fromarray((np.stack(waves, axis=2) * 100 + 128).astype(np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def scaled(preprocess: Preprocess, data: bytes) -> Image.Image:
    return open_image(data).decode(preprocess.needed)


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((640, 480), (320, 240)), ((480, 1920), (240, 960)), ((2001, 1800), (250, 225)), ((447, 900), (447, 900)),
     ((449, 448), (224, 224)), ((100, 100), (100, 100))],
)  # fmt: skip
def test_a_jpeg_keeps_at_least_the_size_that_is_needed(size: tuple[int, int], decoded: tuple[int, int]) -> None:
    assert scaled(Preprocess(size=224), photo(*size)).size == decoded


def test_cmyk_and_grey_jpegs_are_scaled_too_and_other_formats_decoded_whole() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        assert scaled(Preprocess(size=16), photo(160, 120, kind)).size == (160, 120)
    for mode in ("CMYK", "L"):
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(photo(320, 240))) as image:
            image.convert(mode).save(buffer, "JPEG")
        decoded = scaled(Preprocess(size=64), buffer.getvalue())
        assert (decoded.mode, decoded.size) == ("RGB", (160, 120))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (641, 481), (300, 1200), (2000, 1500), (1795, 1601)])
def test_the_pixels_stay_close_to_those_of_a_whole_decode(mode: ResizeMode, size: tuple[int, int]) -> None:
    preprocess, data = Preprocess(size=112, resize_mode=mode), photo(*size, quality=90)
    ours, whole = (preprocess.pixels(image).astype(int) for image in (data, decode_image(data)))
    assert ours.shape == whole.shape
    assert np.abs(ours - whole).mean() < 2


def test_a_turned_jpeg_is_upright_at_any_scale() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its rows are columns
    data = photo(640, 320, exif=exif)
    preprocess = Preprocess(size=64)
    assert scaled(preprocess, data).size == (80, 160)
    turned = preprocess.pixels(decode_image(data)).astype(int)
    assert np.abs(preprocess.pixels(data).astype(int) - turned).mean() < 2
