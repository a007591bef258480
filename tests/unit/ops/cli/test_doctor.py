from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner, Result

from core.errors import RatchetError
from core.loading import load_settings
from core.settings import Settings
from ops.cli.doctor import Finding, examine, fault_of
from ops.cli.main import app
from ops.cli.status import collect
from tests.support.command_line import ratchet
from tests.support.tiny_vlm import tiny_vlm_base
from tests.support.web_server import reply, web_server

GOOD = np.array([[1, 0], [1, 0], [0.6, 0.8]], np.float32)


def checked(vectors: npt.NDArray[np.float32], home: Path) -> tuple[Result, list[str]]:
    rows = [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in vectors]
    with web_server() as server:
        server.pages = {
            "/v1/embeddings": reply(json.dumps({"data": rows}).encode(), connection="close"),
            "/v1/releases": reply(b'{"live": 7, "data": []}', connection="close"),
            "/health/ready/clip": reply(b"{}", connection="close"),
        }
        flags = ["--set", f"home={home}", "--set", "serve.operator_key=k"]
        url = f"http://{server.host}:{server.port}"
        done = CliRunner().invoke(app, [*flags, "doctor", "--wait", "5", "--server", url])
        return done, [head.splitlines()[0] for head in server.asked]


def test_good_embeddings_pass_and_name_their_release_and_wrong_ones_fail(tmp_path: Path) -> None:
    done, asked = checked(GOOD, tmp_path)
    assert done.exit_code == 0, done.output
    assert "as release 7: 2 dimensions" in done.output
    assert [line.split("?")[0].split()[1] for line in asked] == ["/health/ready/clip", "/v1/embeddings", "/v1/releases"]
    done, _ = checked(2 * GOOD, tmp_path)
    assert done.exit_code == 1 and isinstance(done.exception, RatchetError) and "length 1" in done.exception.message


@pytest.mark.parametrize(
    ("vectors", "fault"),
    [
        (GOOD, ""),
        (GOOD[:2], "came back"),
        (np.where(GOOD == 1, np.nan, GOOD), "finite"),
        (np.float32(0.5) * GOOD, "length 1"),
        (GOOD[[0, 2, 1]], "same text differ"),
        (GOOD[[0, 0, 0]], "different texts are the same"),
    ],
)
def test_each_fault_is_named(vectors: npt.NDArray[np.float32], fault: str) -> None:
    assert (fault in fault_of(vectors)) if fault else fault_of(vectors) == ""


def test_doctor_tells_what_is_missing_and_fails_only_for_what_stops_ratchet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.dependency_checks.LOOK_SECONDS", 240.0)  # a busy machine imports Lance for longer than 8 s
    result = ratchet(tmp_path, "--set", "serve.vlm_engine=transformers", "doctor")
    assert result.exit_code == 0
    assert "is not registered" in result.output and "ratchet base build" in result.output
    away = ["--set", "ledger_url=postgresql://a@127.0.0.1:1/b", "--set", 'base.vlm=""']
    assert ratchet(tmp_path, *away, "doctor").exit_code == 1


def test_doctor_names_extras_in_their_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ratchet-server[local]'" in ratchet(tmp_path, "doctor").output


def settings(home: Path, **flags: Any) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings(overrides={"home": home, "serve.port": 1, **named}, environ={})


def findings(made: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(made) if finding.what.startswith(("VLM", "base"))}


def test_a_base_that_is_not_registered_is_named_with_its_fix(tmp_path: Path) -> None:
    without = {
        what: finding.state for what, finding in findings(settings(tmp_path, base__vlm="", base__clip="")).items()
    }
    assert without.pop("base") == "warn", "there is no server without a CLIP"
    assert set(without.values()) == {"ok"}
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
    (tmp_path / "vllm.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
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
