"""`ratchet base`: both families are listed, shown and registered; a first start makes only the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import RatchetError
from core.loading import load_settings
from ops.cli.main import app
from ops.cli.parts import make_ready
from serving.engines.clip_base import list_bases
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base

runner = CliRunner()


def ratchet(home: Path, *words: str) -> str:
    result = runner.invoke(app, ["--set", f"home={home}", *words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_base(tmp_path)
    tiny_vlm_base(tmp_path)
    return tmp_path


def test_both_families_are_listed_and_can_be_told_apart(home: Path) -> None:
    both = ratchet(home, "base", "list")
    assert "tiny-vlm" in both
    assert "Idefics3ForConditionalGeneration" in both
    assert "images of" in both
    assert "Idefics3" not in ratchet(home, "base", "list", "--family", "clip")
    assert "images of" not in ratchet(home, "base", "list", "--family", "vlm")


def test_one_base_is_shown_with_its_layers(home: Path) -> None:
    shown = ratchet(home, "base", "show", "tiny-vlm")
    for fact in ("random weights, for tests", "LoRA in connector", "LoRA in image", "LoRA in text"):
        assert fact in shown
    with pytest.raises(RatchetError, match="there is no base 'tinny'") as caught:
        ratchet(home, "base", "show", "tinny")
    assert "tiny-vlm" in caught.value.fix


def test_a_vlm_is_registered_from_a_folder(home: Path) -> None:
    folder = home / "bases" / "tiny-vlm" / "model"
    assert "mine" in ratchet(home, "base", "add", "mine", "--family", "vlm", "--model", str(folder))
    assert list_bases(home, "vlm") == ["mine", "tiny-vlm"]
    with pytest.raises(RatchetError, match="--weights is for a CLIP"):
        ratchet(home, "base", "add", "m", "--family", "vlm", "--model", str(folder), "--weights", "x.safetensors")


def test_a_first_start_makes_no_vlm_where_none_is_wanted(home: Path) -> None:
    clip = list_bases(home, "clip")[0]
    make_ready(load_settings(None, {"home": str(home), "base.clip": clip, "base.vlm": ""}))
    assert list_bases(home, "vlm") == ["tiny-vlm"]


@pytest.mark.parametrize(("setting", "option"), [("base.clip", "--model"), ("base.vlm", "--family vlm")])
def test_another_base_has_to_be_registered_by_the_operator(home: Path, setting: str, option: str) -> None:
    known = {"base.clip": list_bases(home, "clip")[0], "base.vlm": ""}
    with pytest.raises(RatchetError, match="'mine' is not registered") as caught:
        make_ready(load_settings(None, {"home": str(home), **known, setting: "mine"}))
    assert option in caught.value.fix
