"""Any Hugging Face VLM becomes a base from a folder of safetensors, and from nothing that could run code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import BaseModelError
from serving.engines.vlm.vlm_base import load_vlm_base
from tests.support.tiny_vlm import tiny_vlm_base
from updater.bases.register import add_vlm


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


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
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
