"""What the chart has from elsewhere is what lies there."""

from __future__ import annotations

import runpy
from typing import Any

import yaml

from tests.support.chart import EVERYTHING, ROOT, of_kind, render

GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "helm" / "generate.py"))


def test_the_copies_in_the_chart_are_not_stale() -> None:
    wanted, there = GENERATOR["generate"](), GENERATOR["existing"]()
    stale = [path for path, text in wanted.items() if path not in there or path.read_text() != text]
    assert [*stale, *(there - wanted.keys())] == [], "run `make chart`"


def test_the_rules_are_those_that_promtool_checks() -> None:
    files = sorted((ROOT / "ops" / "alerts").glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert groups
    assert of_kind(render({"monitoring": {"rules": True}}), "PrometheusRule")[0]["spec"]["groups"] == groups


def test_alerts_link_to_the_runbooks() -> None:
    groups = of_kind(render(EVERYTHING), "PrometheusRule")[0]["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"https://git.example/runbooks/{alert['alert']}.md"


def test_every_dashboard_is_a_config_map() -> None:
    found = {name: text for each in of_kind(render(EVERYTHING), "ConfigMap") for name, text in each["data"].items()}
    paths = list((ROOT / "ops" / "dashboards" / "json").glob("*.json"))
    assert paths
    for path in paths:
        assert found[path.name].strip() == path.read_text().strip()
