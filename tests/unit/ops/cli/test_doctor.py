"""`ratchet doctor` and `ratchet status`."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner, Result

from core.errors import RatchetError
from core.loading import load_settings
from ops.cli.doctor import _bytecode, _ports, fault_of
from ops.cli.main import app
from tests.support.command_line import ratchet
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


def test_modules_that_are_compiled_at_each_start_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    found = _bytecode(load_settings())
    assert found.state == "warn" and "compileall" in found.fix
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert _bytecode(load_settings()).state == "ok"


def test_doctor_fails_only_for_what_stops_ratchet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.dependency_checks.LOOK_SECONDS", 240.0)  # a busy machine imports Lance for longer than 8 s
    result = ratchet(tmp_path, "--set", "serve.vlm_engine=transformers", "doctor")
    assert result.exit_code == 0
    assert "is not registered" in result.output and "ratchet base build" in result.output
    assert not (tmp_path / "ledger.db").exists()
    away = ["--set", "ledger_url=postgresql://a@127.0.0.1:1/b", "--set", 'base.vlm=""']
    assert ratchet(tmp_path, *away, "doctor").exit_code == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ratchet-server[local]'" in ratchet(tmp_path, "doctor").output, "with its brackets"


def test_doctor_names_ports_that_other_programs_have_and_not_those_of_ratchet(tmp_path: Path) -> None:
    off = {f"{part}.metrics_port": 0 for part in ("ingest", "maintain", "updater")}
    with web_server() as other, web_server() as ours:
        ours.pages = {"/health/live": reply(b"{}", connection="close")}
        ports = {"serve.port": other.port, "console.port": ours.port}
        settings = load_settings(overrides={"home": tmp_path, **off, **ports})
        found = _ports(settings)
    assert found.state == "warn" and f"serve.port (http://127.0.0.1:{other.port})" in found.found
    assert "console" not in found.found
    assert _ports(settings).state == "ok"
