"""VLM families by small random models: `base add` accepts those that work and rejects others.

`ratchet bench families` tests the rest: updates, both engines and the gate.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import BaseModelError
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_engine import score
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.support.vlm_families import FAMILIES, write_family
from updater.bases.register import add_vlm
from updater.gate.checks import check_vlm_parity


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(models: Path, name: str) -> Path:
    folder = models / name
    if not folder.exists():
        write_family(name, folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_works_is_added_with_the_parts_of_adapters(name: str, models: Path, tmp_path: Path) -> None:
    base = add_vlm(tmp_path, "tried", model_of(models, name))
    assert {"image", "text"} <= base.lora_targets.keys()
    names = [module for module, _ in base.build_model().named_modules()]
    assert any(base.part_of(module) == "text" for module in names)


def test_what_the_trainer_says_of_an_answer_is_compared_where_tokens_have_types(models: Path, tmp_path: Path) -> None:
    """Qwen's processor gives each token a type, including those of the answer."""
    base = add_vlm(tmp_path, "tried", model_of(models, "Qwen2-VL"))
    tiny_vlm_adapter(base, tmp_path / "adapter", seed=1)
    model = base.build_model()
    asks, answers = [question(np.full((32, 32, 3), 90, np.uint8), "which colour?")], ["a round apple"]
    served = [score(model, base.processor(), asks[0], answers)] * 2
    check = check_vlm_parity(base, model, tmp_path / "adapter", asks, answers, served)
    assert check.value is not None and check.value > 1e-3, "the adapter says something else than the base"
    assert not check.ok


def test_a_model_that_cannot_be_shown_a_picture_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_of(models, "LLaVA").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")
    with pytest.raises(BaseModelError, match="cannot be asked about a picture") as caught:
        add_vlm(tmp_path / "home", "blind", folder)
    assert "ratchet bench families" in caught.value.fix
    assert not (tmp_path / "home" / "bases" / "blind").exists()


def test_a_model_of_other_layer_names_is_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.vlm.vlm_base._TARGETS", ("nothing",))
    with pytest.raises(BaseModelError, match="no layer of a language model"):
        add_vlm(tmp_path, "odd", model_of(models, "LLaVA"))
    assert json.loads((models / "LLaVA" / "config.json").read_text())["architectures"]
