"""`ratchet doctor` and `ratchet status`."""

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
from ops.cli.status import catalog_lines, collect, learning_line, replica_lines, rollout_line
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
        return done, [head.split("?")[0].split()[1] for head in server.asked]


def test_good_embeddings_pass_and_name_their_release_and_wrong_ones_fail(tmp_path: Path) -> None:
    done, asked = checked(GOOD, tmp_path)
    assert done.exit_code == 0, done.output
    assert "as release 7: 2 dimensions" in done.output
    assert asked == ["/health/ready/clip", "/v1/embeddings", "/v1/releases"]
    done, _ = checked(2 * GOOD, tmp_path)
    assert done.exit_code == 1 and isinstance(done.exception, RatchetError) and "length 1" in done.exception.message
    assert fault_of(GOOD) == ""
    for vectors, fault in (
        (GOOD[:2], "came back"),
        (np.where(GOOD == 1, np.nan, GOOD), "finite"),
        (np.float32(0.5) * GOOD, "length 1"),
        (GOOD[[0, 2, 1]], "same text differ"),
        (GOOD[[0, 0, 0]], "different texts are the same"),
    ):
        assert fault in fault_of(vectors)


def test_doctor_fails_only_for_what_stops_ratchet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.dependency_checks.LOOK_SECONDS", 240.0)  # a busy machine imports Lance for longer than 8 s
    result = ratchet(tmp_path, "--set", "serve.vlm_engine=transformers", "doctor")
    assert result.exit_code == 0
    assert "is not registered" in result.output and "ratchet base build" in result.output
    away = ["--set", "ledger_url=postgresql://a@127.0.0.1:1/b", "--set", 'base.vlm=""']
    assert ratchet(tmp_path, *away, "doctor").exit_code == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ratchet-server[local]'" in ratchet(tmp_path, "doctor").output, "with its brackets"


def settings(home: Path, **flags: Any) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings(overrides={"home": home, "serve.port": 1, **named}, environ={})


def findings(made: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(made) if finding.what.startswith(("VLM", "base"))}


def test_a_base_that_is_not_registered_is_named_with_its_fix(tmp_path: Path) -> None:
    without = findings(settings(tmp_path, base__vlm="", base__clip=""))
    assert without.pop("base").state == "warn", "there is no server without a CLIP"
    assert {finding.state for finding in without.values()} == {"ok"}
    found = findings(settings(tmp_path, serve__vlm_engine="transformers"))["VLM base"]
    assert (found.state, "shipped-vlm" in found.found, "base build" in found.fix) == ("warn", True, True)
    tiny_vlm_base(tmp_path)
    known = settings(tmp_path, base__vlm="tiny-vlm", serve__vlm_engine="transformers")
    assert findings(known)["VLM base"].state == "ok"
    assert collect(known)["vlm"] == {"base": "tiny-vlm", "registered": True, "replicas": [], "problem": ""}
    assert collect(settings(tmp_path, base__vlm="nobody"))["vlm"]["registered"] is False


def test_a_vllm_that_is_missing_or_broken_has_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    for engine, state in (("auto", "warn"), ("vllm", "fail")):  # a failure only where it was asked for
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
            found = findings(settings(tmp_path, serve__vlm_engine=engine))["VLM engine"]
        assert found.state == state and "pip install" in found.fix
    (tmp_path / "vllm.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    found = findings(settings(tmp_path / "home", serve__vlm_engine="vllm"))["VLM engine"]
    assert found.state == "fail" and "libc10_cuda.so" in found.found and "pip uninstall torchaudio" in found.fix


def test_status_says_what_is_not_searchable_not_running_on_trial_and_not_enough_for_a_verdict() -> None:
    def space(missing: int, left: float | None = None, building: bool = False) -> dict[str, Any]:
        rate = {"rows_per_second": 80.2, "seconds_left": left}
        return {"missing": missing, "coverage": 1 - missing / 1000, **rate, "index": {"building": building}}

    catalog = {"corpus_rows": 1000, "coverage": 1.0, "spaces": {"aaaa": space(0)}}
    assert catalog_lines(catalog) == "catalog: 1,000 samples, 100.0% searchable everywhere\n"
    catalog["spaces"] = {"aaaa": space(0), "bbbb": space(250, 3725.4), "cccc": space(250), "dddd": space(0, 0.0, True)}
    assert catalog_lines(catalog).splitlines()[1:] == [
        "  bbbb is embedded: 75.0%, 80 rows/s, 1:02:05 left",
        "  cccc is embedded: 75.0%, 80 rows/s, no estimate yet",
        "  dddd: its index is being made",
    ]
    replicas = {"Encoder": {"RUNNING": 2}, "Vlm": {"STARTING": 1, "RUNNING": 1}, "Catalog": {"STOPPING": 1}}
    assert replica_lines(replicas) == "Catalog: 1 stopping\nVlm: 1 running, 1 starting\n"
    assert catalog_lines(None) == replica_lines({}) == rollout_line({"state": "idle"}) == ""
    kept = {"adapter": "clip-a", "looks": 2, "asked_again_with": 1300}
    told = {"fresh_items": 1120, "fresh_items_needed": 1400, "lacks": "", "alpha": 0.05, "alpha_spent": 0.038}
    assert learning_line("clip", {**told, "kept": kept}).splitlines() == [
        "clip: 1,120 of 1,400 fresh items",
        "  alpha 0.05: 0.038 spent on gains since the last release, 0.012 left",
        "  clip-a: 2 looks, the next with 1,300 fresh items",
    ]
    trial = {"release": 7, "incumbent": 6, "compared": {"clip": {"agreed": 39, "inputs": 40}}}
    canary = {**trial, "state": "canary", "share": 0.1, "seconds_left": None}
    assert rollout_line(canary) == "canary 10% release 7 against 6: clip agrees on 39 of 40\n"
    watched = {**trial, "state": "guard", "share": 1.0, "seconds_left": 61.4}
    assert rollout_line(watched) == "guard watches release 7 against 6: clip agrees on 39 of 40, 61 s left\n"
