"""What `ratchet doctor` and `ratchet status` say about the VLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from core.loading import load_settings
from core.settings import Settings
from ops.cli.doctor import Finding, examine
from ops.cli.status import collect
from tests.support.tiny_vlm import tiny_vlm_base


def settings(home: Path, **flags: Any) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings(overrides={"home": home, "serve.port": 1, **named}, environ={})


def findings(made: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(made) if finding.what.startswith("VLM")}


def test_without_a_vlm_nothing_is_missing(tmp_path: Path) -> None:
    found = findings(settings(tmp_path, base__vlm=""))
    assert {finding.state for finding in found.values()} == {"ok"}


def test_a_base_that_is_not_registered_is_named_with_its_fix(tmp_path: Path) -> None:
    found = findings(settings(tmp_path, serve__vlm_engine="transformers"))["VLM base"]
    assert (found.state, "shipped-vlm" in found.found, "base build" in found.fix) == ("warn", True, True)
    tiny_vlm_base(tmp_path)
    known = settings(tmp_path, base__vlm="tiny-vlm", serve__vlm_engine="transformers")
    assert findings(known)["VLM base"].state == "ok"


@pytest.mark.parametrize(("engine", "state"), [("auto", "warn"), ("vllm", "fail")])
def test_a_missing_vllm_is_a_failure_only_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, state: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    found = findings(settings(tmp_path, serve__vlm_engine=engine))["VLM engine"]
    assert found.state == state
    assert "pip install" in found.fix


def test_a_vllm_whose_libraries_do_not_load_is_found_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    found = findings(settings(tmp_path / "home", serve__vlm_engine="vllm"))["VLM engine"]
    assert found.state == "fail"
    assert "libc10_cuda.so" in found.found
    assert "pip uninstall torchaudio" in found.fix


def test_status_tells_the_base_and_whether_a_replica_answers(tmp_path: Path) -> None:
    tiny_vlm_base(tmp_path)
    found = collect(settings(tmp_path, base__vlm="tiny-vlm"))["vlm"]
    assert found == {"base": "tiny-vlm", "registered": True, "replicas": [], "problem": ""}
    assert collect(settings(tmp_path, base__vlm="nobody"))["vlm"]["registered"] is False
