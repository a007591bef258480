"""The rules, as Prometheus' own tool reads them: they are valid, and fire when they should and only then."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ops.alerts import rule_files, rule_groups
from ops.cli.main import app
from tests.support.pages import ROOT

pytestmark = pytest.mark.integration
CASES = sorted(Path(__file__).parent.glob("*.yaml"))
ALERTS = sorted({rule["alert"] for group in rule_groups() for rule in group["rules"] if "alert" in rule})


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", *rule_files())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_alerts_fire_when_they_should_and_only_then(case: Path) -> None:
    promtool("test", "rules", case)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_cases_show_an_alert_firing_and_silent(alert: str) -> None:
    checks: list[dict[str, Any]] = [
        check
        for case in CASES
        for test in yaml.safe_load(case.read_text())["tests"]
        for check in test["alert_rule_test"]
        if check["alertname"] == alert
    ]
    assert {bool(check.get("exp_alerts")) for check in checks} == {True, False}


def test_the_printed_configuration_and_rules_are_valid(tmp_path: Path) -> None:
    for words, file in ((["prometheus", "--alertmanager", "127.0.0.1:9093"], "prometheus.yml"), (["rules"], "all.yml")):
        (tmp_path / file).write_text(CliRunner().invoke(app, ["metrics", *words]).stdout)
    promtool("check", "config", tmp_path / "prometheus.yml")
    promtool("check", "rules", tmp_path / "all.yml")


def test_the_example_of_a_configuration_is_valid() -> None:
    promtool("check", "config", ROOT / "examples" / "grafana" / "prometheus.yml")
