from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from core.errors import LedgerError, RatchetError
from core.ledger import Ledger
from core.loading import load_settings
from ops.cli.parts import make_ready
from serving.engines.clip_base import list_bases
from tests.support.command_line import ratchet
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base

GIVEN: dict[str, Any] = {
    "recipe": {"name": "default"}, "seed": 1, "store_version": 0, "data_from": {}, "data_to": {}, "incumbent": None,
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    settings = load_settings(overrides={"home": tmp_path})
    made = Ledger.open(settings.ledger)
    made.begin_update("update-1", family="clip", **GIVEN)
    return made


def test_an_update_is_abandoned_with_a_reason_and_taken_up_again(tmp_path: Path, ledger: Ledger) -> None:
    ended = ratchet(tmp_path, "trainer", "abandon", "update-1", "--reason", "broken pictures")
    assert ended.exit_code == 0, ended.output
    update = ledger.update("update-1")
    assert update.state == "failed" and str(update.error).endswith(": broken pictures")
    with pytest.raises(LedgerError):
        ratchet(tmp_path, "trainer", "abandon", "update-1", "--reason", "again")
    ledger.advance_update("update-1", cost={"attempts": 3})
    assert ratchet(tmp_path, "trainer", "retry", "update-1").exit_code == 0
    update = ledger.update("update-1")
    assert (update.state, update.error, update.cost["attempts"]) == ("training", None, 0)
    assert [row.action for row in ledger.audit_rows(subject="update update-1")] == ["update.retry", "update.abandon"]


def test_an_update_that_another_one_followed_is_not_taken_up_again(tmp_path: Path, ledger: Ledger) -> None:
    ledger.advance_update("update-1", "failed", error="it broke off")
    ledger.begin_update("update-2", family="clip", **GIVEN)
    with pytest.raises(LedgerError, match="not the newest"):
        ratchet(tmp_path, "trainer", "retry", "update-1")
    assert ledger.update("update-1").state == "failed"
    with pytest.raises(LedgerError):
        ratchet(tmp_path, "trainer", "retry", "update-3")


@pytest.mark.parametrize(("words", "once"), [((), False), (("--once",), True)])
def test_maintain_runs_maintenance_under_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], once: bool
) -> None:
    ran: list[tuple[Path, bool]] = []
    part = ModuleType("streams.store.maintenance")
    part.run_maintain = lambda settings, *, once, collect: ran.append((settings.home, once))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "streams.store.maintenance", part)
    assert ratchet(tmp_path, "maintain", *words).exit_code == 0
    assert ran == [(tmp_path, once)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_base(tmp_path)
    tiny_vlm_base(tmp_path)
    return tmp_path


def test_both_families_are_listed_and_can_be_told_apart(home: Path) -> None:
    both = ratchet(home, "base", "list").output
    assert "tiny-vlm" in both
    assert "Idefics3ForConditionalGeneration" in both
    assert "images of" in both
    assert "Idefics3" not in ratchet(home, "base", "list", "--family", "clip").output
    assert "images of" not in ratchet(home, "base", "list", "--family", "vlm").output


def test_one_base_is_shown_with_its_layers(home: Path) -> None:
    shown = ratchet(home, "base", "show", "tiny-vlm").output
    for fact in ("random weights, for tests", "LoRA in connector", "LoRA in image", "LoRA in text"):
        assert fact in shown
    with pytest.raises(RatchetError, match="there is no base 'tinny'") as caught:
        ratchet(home, "base", "show", "tinny")
    assert "tiny-vlm" in caught.value.fix


def test_a_vlm_is_registered_from_a_folder(home: Path) -> None:
    folder = home / "bases" / "tiny-vlm" / "model"
    assert "mine" in ratchet(home, "base", "add", "mine", "--family", "vlm", "--model", str(folder)).output
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
