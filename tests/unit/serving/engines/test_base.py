from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from core.errors import BaseModelError
from ratchet_client.images import decode_image, open_image
from serving.engines.clip_base import ClipBase, base_directory, list_bases, load_base, save_base
from serving.engines.preprocess import Preprocess, ResizeMode
from serving.engines.tokens import CLEAN, BoundedTokenizer, make_tokenizer, pad_rows, vocabulary
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
def test_a_damaged_base_is_refused_and_why(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
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


def test_a_space_is_weights_preprocessing_and_dimension(base: ClipBase) -> None:
    def changed(**changes: Any) -> tuple[bool, bool]:
        found = replace(base, **changes).spaces
        return found.image != base.spaces.image, found.text != base.spaces.text

    assert changed(preprocess=Preprocess(size=33)) == (True, False)
    assert changed(context_length=8) == (False, True)
    assert changed(dim=33) == (True, True)
    assert changed(tensors=base.tensors | {"logit_scale": "0" * 64}) == (False, False), "it scales logits, no vectors"


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


CONTEXT = 24
REFERENCE = SimpleTokenizer(context_length=CONTEXT)
OURS = BoundedTokenizer(vocabulary(), CONTEXT)
ORDINARY = [
    "", "!", "a photo of a cat", "A small HOUSE beside the lake, at night.", "it's 12:30; they're 1,000 &amp; more",
    "Ein Fußgänger überquert die Straße", "日本語のテキスト", "поезд на мосту", "👩‍👩‍👧‍👦 family 🎉🎉", "a\tb\n\nc   d",
    "<start_of_text> inside <end_of_text> of a text", "antidisestablishmentarianism pneumonoultramicroscopic",
    "aaaaaaaaaaaaaaaaaaaa", "abababababababab!!!!....????", "word " * 60, "ﬁnally ½ ² cafe\u0301 \u200b zero",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_have_the_ids_of_open_clip(text: str) -> None:
    assert OURS([text]).tolist() == REFERENCE([text]).tolist()


@pytest.mark.parametrize("name", sorted(CLEAN))
@pytest.mark.parametrize("text", [*ORDINARY, "Under_score, &amp;amp; \x1c ends.\u2028"])
def test_texts_are_cleaned_as_open_clip_cleans_them(name: str, text: str) -> None:
    assert CLEAN[name](text) == get_clean_fn(name)(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_the_ids_of_open_clip(text: str) -> None:
    assert OURS([text, "x"]).tolist() == REFERENCE([text, "x"]).tolist()


def test_it_knows_which_texts_it_cut_and_does_not_encode_what_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", "a cat", "word " * (CONTEXT - 2), "word " * (CONTEXT - 1), "word " * 60, "x" * 5000]
    cut = [OURS.cuts(text, row) for text, row in zip(texts, OURS.rows(texts), strict=True)]
    assert cut == [False, False, False, True, True, True]
    words: list[str] = []
    tokenizer = BoundedTokenizer(vocabulary(), 8)
    monkeypatch.setattr(tokenizer, "word", lambda word: words.append(word) or [1])
    assert [len(row) for row in tokenizer.rows(["cat " * 500])] == [8]
    assert len(words) == 6


@pytest.mark.parametrize("alphabet", ["a", "abcdefghijklmnopqrstuvwxyz"])
def test_a_long_word_has_the_ids_of_open_clip(alphabet: str) -> None:
    word = "".join(random.Random(0).choices(alphabet, k=300))
    whole = BoundedTokenizer(vocabulary(), 400)
    assert whole([word]).tolist() == SimpleTokenizer(context_length=400)([word]).tolist()


@pytest.mark.parametrize("mode", [None, "slow"])
def test_a_pad_token_that_texts_have_too_is_counted_where_a_text_has_it(tmp_path: Path, mode: str | None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "cat": 2, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    saved = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    saved.save_pretrained(tmp_path / "text")
    kwargs = {"strip_sep_token": False} if mode else {}
    config = {"kind": "hf", "directory": "text", "trim": False, "mode": None, "kwargs": kwargs}
    tokenizer = make_tokenizer(config, tmp_path, 6)
    assert tokenizer(["a cat", "a"]).tolist() == [[1, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokenizer.rows(["a cat", "a", "a cat " * 9]) == [[1, 2, 0], [1, 0], [1, 2, 1, 2, 1, 0]]
    assert pad_rows(tokenizer.rows(["a cat", "a"]), 6, tokenizer.pad_id).tolist() == tokenizer(["a cat", "a"]).tolist()
