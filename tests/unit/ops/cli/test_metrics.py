"""`ratchet metrics`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from core.addresses import free_port
from core.errors import ConfigError
from ops.cli.main import app

ROOT = Path(__file__).resolve().parents[4]


def targets(*settings: str, host: str = "127.0.0.1") -> dict[str, str]:
    flags = [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, [*flags, "metrics", "targets", "--host", host])
    assert result.exit_code == 0, result.output
    return {entry["labels"]["process"]: entry["targets"][0] for entry in json.loads(result.output)}


def test_targets_are_the_ports_of_the_settings() -> None:
    ports = ("serve.port=9001", "ingest.metrics_port=9002", "updater.metrics_port=9003", "maintain.metrics_port=9004")
    found = targets(*ports, host="box")
    assert found == {"serve": "box:9001", "ingest": "box:9002", "maintain": "box:9004", "update": "box:9003"}


def test_what_is_off_is_no_target_and_ray_is_one_when_it_is_on() -> None:
    found = targets("ingest.metrics_port=0", "serve.ray_metrics_port=9004")
    assert set(found) == {"serve", "maintain", "update", "ray"} and found["ray"] == "127.0.0.1:9004"


def test_who_exports_the_metrics_of_replicas_does_not_write_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["metrics", "serve", str(tmp_path), "--port", "0"])
    assert isinstance(result.exception, ConfigError)
    assert "PROMETHEUS_MULTIPROC_DIR" in str(result.exception)


def test_it_exports_what_replicas_wrote_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    wrote = "from core import metrics; metrics.http.refused('overloaded')"
    writing = {**environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", wrote], env=writing, check=True)
    written = sorted(tmp_path.iterdir())
    port = free_port()
    command = [sys.executable, "-m", "ops.cli.main", "metrics", "serve", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert str(port) in process.stderr.readline()  # it listens
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'ratchet_http_refused_total{reason="overloaded"} 1.0' in page
        assert sorted(tmp_path.iterdir()) == written
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
