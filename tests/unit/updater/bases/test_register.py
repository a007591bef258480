from __future__ import annotations

import copy
import json
import shutil
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


def test_a_built_in_architecture_answers_as_in_open_clip(tmp_path: Path, weights: Path) -> None:
    base = add_base(tmp_path, "mine", NAME, weights)
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


def test_registering_twice_is_once_and_half_precision_is_widened(tmp_path: Path, weights: Path) -> None:
    first = add_base(tmp_path, "mine", NAME, weights)
    assert add_base(tmp_path, "mine", NAME, weights).digest == first.digest
    half = add_base(tmp_path, "half", NAME, _save(tmp_path / "half.safetensors", CONFIG, half=True))
    assert {p.dtype for p in half.build_model().parameters()} == {torch.float32}


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


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_pickles_are_refused_whatever_they_are_called(tmp_path: Path, weights: Path, suffix: str) -> None:
    path = tmp_path / f"pickle{suffix}"
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(BaseModelError, match="no safetensors file") as caught:
        add_base(tmp_path, "mine", NAME, path)
    assert "save_file" in caught.value.fix
    assert not (tmp_path / "bases").exists()


def test_a_folder_with_only_a_pickle_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BaseModelError, match=r"only open_clip_pytorch_model\.bin"):
        add_base(tmp_path, "mine", f"local-dir:{tmp_path}")


def test_weights_of_another_model_are_refused(tmp_path: Path, weights: Path) -> None:
    wider = _save(tmp_path / "wider.safetensors", {**CONFIG, "embed_dim": 48})
    save_file({}, empty := tmp_path / "empty.safetensors")
    for wrong in (wider, empty):
        with pytest.raises(BaseModelError, match="does not hold the weights"):
            add_base(tmp_path, "mine", NAME, wrong)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, weights: Path) -> None:
    torch.manual_seed(0)
    state = open_clip.model.CLIP(**copy.deepcopy(CONFIG)).state_dict()
    state["visual.proj"] = state["visual.proj"].clone().fill_(float("nan"))
    save_file(state, weights)
    with pytest.raises(BaseModelError, match="not finite"):
        add_base(tmp_path, "mine", NAME, weights)
    assert list((tmp_path / "bases").iterdir()) == []


def test_mistakes_in_the_name_are_explained(tmp_path: Path) -> None:
    for model, weights, words in (
        ("ViT-B-61", None, "no model 'ViT-B-61'"), ("ViT-B-16", None, "without weights"),
        ("ViT-B-16", tmp_path / "nothing.safetensors", "There is no weights file"),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match=words):
            add_base(tmp_path, "mine", model, weights)


# A VLM


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm_base(tmp_path_factory.mktemp("home")).model


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def test_a_folder_becomes_a_base_that_needs_it_no_longer(folder: Path, tmp_path: Path) -> None:
    base = add_vlm(tmp_path, "mine", folder)
    assert add_vlm(tmp_path, "mine", str(folder)).digest == base.digest
    shutil.rmtree(folder)
    again = load_vlm_base(tmp_path, "mine")
    assert again.about == {"model": str(folder)}
    assert again.part_of("model.text_model.layers.0.self_attn.q_proj") == "text"
    assert sum(p.numel() for p in again.build_model().parameters()) > 10_000


def test_only_pickled_weights_are_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"only pickled weights \(pytorch_model\.bin\)") as caught:
        add_vlm(tmp_path, "mine", folder)
    assert "save_pretrained" in caught.value.fix
    assert not (tmp_path / "bases").exists()


def test_a_pickle_beside_safetensors_is_left_behind(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "modeling_mine.py").write_text("raise SystemExit(1)")
    base = add_vlm(tmp_path, "mine", folder)
    assert {path.suffix for path in base.model.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_mine.Mine"}}))
    with pytest.raises(BaseModelError, match="code of its own"):
        add_vlm(tmp_path, "mine", folder)


def test_a_vlm_whose_weights_are_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("q_proj.weight"))
    save_file(state | {name: state[name] * float("nan")}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="not finite"):
        add_vlm(tmp_path, "mine", folder)
    assert list((tmp_path / "bases").iterdir()) == []


def test_another_model_under_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    add_vlm(tmp_path, "mine", folder)
    other = tiny_vlm_base(tmp_path / "elsewhere", seed=1)
    with pytest.raises(BaseModelError):
        add_vlm(tmp_path, "mine", other.model)


def test_mistakes_in_the_place_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseModelError, match="There is no folder") as caught:
        add_vlm(tmp_path, "mine", tmp_path / "nothing")
    assert "hf-hub:" in caught.value.fix
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match="no Hugging Face model"):
        add_vlm(tmp_path, "mine", tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="cannot be fetched from the hub") as offline:
        add_vlm(tmp_path, "mine", "hf-hub:nobody/nothing")
    assert "give its folder" in offline.value.fix
