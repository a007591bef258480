from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import BaseModelError
from serving.engines.clip import ClipEngine
from serving.engines.vlm.vlm_base import load_vlm_base
from tests.support.tiny import CONFIG, tiny_adapter
from tests.support.tiny_vlm import tiny_vlm_base
from updater.bases.register import add_base, add_vlm

NAME = "ViT-tiny-test"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, copy.deepcopy(CONFIG))
    return _save(tmp_path / "model.safetensors", CONFIG)


def _save(path: Path, config: dict[str, Any], half: bool = False) -> Path:
    torch.manual_seed(5)
    model = open_clip.model.CLIP(**copy.deepcopy(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: (v.half() if half else v).contiguous() for k, v in model.state_dict().items()}, path)
    return path


def refused(match: str, home: Path, *given: Any, add: Callable[..., object] = add_base) -> str:
    """What to do, of a model that is refused; nothing of it is kept."""
    with pytest.raises(BaseModelError, match=match) as caught:
        add(home, "mine", *given)
    assert not (home / "bases").exists() or list((home / "bases").iterdir()) == []
    return caught.value.fix


def test_a_built_in_architecture_answers_as_in_open_clip(tmp_path: Path, weights: Path) -> None:
    base = add_base(tmp_path, "mine", NAME, weights)
    assert add_base(tmp_path, "mine", NAME, weights).digest == base.digest, "registering twice is once"
    engine = ClipEngine(base, device="cpu")
    theirs = open_clip.create_model(NAME, pretrained=str(weights)).eval()
    weights.unlink()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    pixels = image_transform_v2(PreprocessCfg(size=32), is_train=False)(image)[None]
    tokens = open_clip.get_tokenizer(NAME)(["a red bus"])
    with torch.inference_mode():
        expected = theirs.encode_image(pixels, normalize=True), theirs.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(engine.encode_images(base.preprocess.pixels(image)[None]), expected[0], atol=1e-5)
    np.testing.assert_allclose(engine.encode_texts(["a red bus"]), expected[1], atol=1e-5)
    name = tiny_adapter(base, tmp_path / "adapter", seed=1)
    assert engine.load(name, tmp_path / "adapter") != engine.spaces()
    assert engine.golden(name)["adapter"] == name
    half = add_base(tmp_path, "half", NAME, _save(tmp_path / "half.safetensors", CONFIG, half=True))
    assert {p.dtype for p in half.build_model().parameters()} == {torch.float32}, "half precision is widened"


@pytest.mark.parametrize("tower", ["fastvit_t8", "repvit_m0_9", "mobileone_s0", "resnet18"])
def test_branches_for_training_alone_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: str) -> None:
    vision = {"timm_model_name": tower, "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    config = CONFIG | {"vision_cfg": vision, "custom_text": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, config)
    torch.manual_seed(3)
    theirs = open_clip.create_model(NAME)
    pixels = torch.rand(4, 3, 64, 64)
    theirs.train().encode_image(pixels)  # its batch norms have seen something
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    base = add_base(tmp_path, "mine", NAME, tmp_path / "w.safetensors")
    with torch.inference_mode():
        expected = theirs.eval().encode_image(pixels, normalize=True)
        np.testing.assert_allclose(base.build_model().encode_image(pixels, normalize=True), expected, atol=1e-5)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (base.build_model(), theirs)]
    assert (norms[0] < norms[1]) == (tower != "resnet18")
    name = tiny_adapter(base, tmp_path / "adapter", seed=1)
    assert ClipEngine(base, device="cpu").load(name, tmp_path / "adapter") != base.spaces


def test_a_folder_with_its_own_tokenizer_needs_no_network(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    config["text_cfg"] |= {"hf_tokenizer_name": "nobody/nowhere", "vocab_size": 64}
    plain = copy.deepcopy(config)
    _save(folder / "open_clip_model.safetensors", plain)
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    _write_tokenizer(folder)
    base = add_base(tmp_path, "mine", f"local-dir:{folder}")
    assert base.preprocess.mean == (0.5, 0.5, 0.5)
    assert base.preprocess.resize_mode == "squash"
    ids = base.tokenizer()(["red bus", "red"])
    # A tower that does not mask padding learnt it: its texts keep their full length.
    assert ids.shape == (2, 16)
    assert ids[0, :3].tolist() == [5, 6, 3]
    assert ClipEngine(base, device="cpu").encode_texts(["red bus"]).shape == (1, 32)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "red": 5, "bus": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_pickles_are_refused_whatever_they_are_called(tmp_path: Path, weights: Path, suffix: str) -> None:
    path = tmp_path / f"pickle{suffix}"
    torch.save({"x": torch.ones(2)}, path)
    assert "save_file" in refused("not a safetensors file", tmp_path, NAME, path)
    (folder := tmp_path / "folder").mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"x")
    refused(r"only open_clip_pytorch_model\.bin", tmp_path, f"local-dir:{folder}")


def test_weights_of_another_model_or_that_are_not_finite_are_refused(tmp_path: Path, weights: Path) -> None:
    save_file({}, empty := tmp_path / "empty.safetensors")
    for wrong in (_save(tmp_path / "wider.safetensors", {**CONFIG, "embed_dim": 48}), empty):
        refused("does not hold the weights", tmp_path, NAME, wrong)
    state = load_file(weights)
    save_file(state | {"visual.proj": state["visual.proj"] * float("nan")}, weights)
    refused("not finite", tmp_path, NAME, weights)


def test_mistakes_in_the_name_are_explained(tmp_path: Path) -> None:
    refused("no model 'ViT-B-61'", tmp_path, "ViT-B-61")
    refused("without weights", tmp_path, "ViT-B-16")
    refused("There is no weights file", tmp_path, "ViT-B-16", tmp_path / "nothing.safetensors")


# A VLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.move(tiny_vlm_base(tmp_path / "made").model, tmp_path / "model"))


def test_a_folder_becomes_a_base_that_needs_it_no_longer(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "modeling_mine.py").write_text("raise SystemExit(1)")
    base = add_vlm(tmp_path, "mine", folder)
    assert add_vlm(tmp_path, "mine", str(folder)).digest == base.digest
    shutil.rmtree(folder)
    again = load_vlm_base(tmp_path, "mine")
    assert again.about == {"model": str(folder)}
    assert again.part_of("model.text_model.layers.0.self_attn.q_proj") == "text"
    assert sum(p.numel() for p in again.build_model().parameters()) > 10_000
    kept = {path.suffix for path in again.model.iterdir()}
    assert kept <= {".json", ".safetensors", ".jinja"}, "pickles and code beside safetensors are left behind"
    other = tiny_vlm_base(tmp_path / "elsewhere", seed=1)
    with pytest.raises(BaseModelError):
        add_vlm(tmp_path, "mine", other.model)


def test_pickled_weights_code_of_its_own_and_weights_of_nan_are_refused(folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, plain = load_file(weights), config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "auto_map": {"AutoModel": "modeling_mine.Mine"}}))
    refused("code of its own", tmp_path, folder, add=add_vlm)
    config.write_text(plain)
    name = next(name for name in state if name.endswith("q_proj.weight"))
    save_file(state | {name: state[name] * float("nan")}, weights, metadata={"format": "pt"})
    refused("not finite", tmp_path, folder, add=add_vlm)
    weights.unlink()
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    fix = refused(r"only pickled weights \(pytorch_model\.bin\)", tmp_path, folder, add=add_vlm)
    assert "save_pretrained" in fix


def test_mistakes_in_the_place_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hf-hub:" in refused("There is no folder", tmp_path, tmp_path / "nothing", add=add_vlm)
    (tmp_path / "empty").mkdir()
    refused("no Hugging Face model", tmp_path, tmp_path / "empty", add=add_vlm)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fix = refused("cannot be fetched from the hub", tmp_path, "hf-hub:nobody/nothing", add=add_vlm)
    assert "give its folder" in fix
