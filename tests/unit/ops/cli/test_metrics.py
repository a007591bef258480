from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from core.addresses import free_port
from core.errors import ConfigError
from ops.cli.main import app

ROOT = Path(__file__).resolve().parents[4]


def test_prometheus_is_told_the_ports_of_the_settings() -> None:
    ports = ("serve.port=9000", "ingest.metrics_port=0", "updater.metrics_port=9999", "maintain.metrics_port=9998")
    flags = [word for port in (*ports, "serve.ray_metrics_port=9004") for word in ("--set", port)]
    listed = json.loads(CliRunner().invoke(app, [*flags, "metrics", "targets", "--host", "box"]).output)
    assert {each["labels"]["process"]: each["targets"] for each in listed} == {
        "serve": ["box:9000"], "maintain": ["box:9998"], "update": ["box:9999"], "ray": ["box:9004"],
    }  # fmt: skip
    words = ["prometheus", "--host", "box", "--alertmanager", "am:9093", "--rules", "a.yml"]
    done = CliRunner().invoke(app, [*flags, "metrics", *words])
    told = yaml.safe_load(done.stdout)
    assert [job["static_configs"] for job in told["scrape_configs"]] == [listed]
    assert told["rule_files"] == ["a.yml"]
    assert told["alerting"] == {"alertmanagers": [{"static_configs": [{"targets": ["am:9093"]}]}]}
    assert "ingest.metrics_port is 0" in done.stderr


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
