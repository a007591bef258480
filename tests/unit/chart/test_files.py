from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import ROOT, of_kind, render

GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "helm" / "generate.py"))


def test_the_copies_in_the_chart_are_not_stale() -> None:
    wanted, there = GENERATOR["generate"](), GENERATOR["existing"]()
    stale = [path for path, text in wanted.items() if path not in there or path.read_text() != text]
    assert [*stale, *(there - wanted.keys())] == [], "run `make chart`"


def rules_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = of_kind(objects, "PrometheusRule")[0]["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_rules_are_those_that_promtool_checks_each_of_one_namespace() -> None:
    files = sorted((ROOT / "ops" / "alerts").glob("*.yaml"))
    known = [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
    made = rules_of(render({"monitoring": {"rules": True}}))
    assert known
    assert [(each.get("alert"), each.get("record")) for each in made] == [
        (each.get("alert"), each.get("record")) for each in known
    ]
    scope = "namespace='ml'"
    for rule, origin in zip(made, known, strict=True):
        assert rule["labels"] == {**origin.get("labels", {}), "namespace": "ml"}
        metrics = re.findall(r"\bratchet[_:][a-z0-9_:]+", origin["expr"])
        assert len(re.findall(rf"\bratchet[_:][a-z0-9_:]+\{{{scope}", rule["expr"])) == len(metrics), rule["expr"]
        assert rule["expr"].replace(f"{{{scope}}}", "").replace(f"{scope}, ", "") == origin["expr"]
        queries = re.findall(r"\bratchet[_:][a-z0-9_:]+", json.dumps(origin.get("annotations")))
        assert json.dumps(rule.get("annotations")).count(scope) == len(queries)


SERIES = """
rule_files: [rules.yaml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'ratchet_release_live{part="encoder", namespace="ml"}', values: '7x30'}
      - {series: 'ratchet_release_live{part="encoder", namespace="other"}', values: '3x30'}
      - {series: 'ratchet_ingest_bytes_total{namespace="other"}', values: '1x30'}
      - {series: 'ratchet_ingest_lag_records{partition="0", namespace="ml"}', values: '60x30'}
      - {series: 'ratchet_ingest_records_total{namespace="ml"}', values: '0+60x30'}
      - {series: 'ratchet_ingest_samples_total{namespace="ml"}', values: '0+30x30'}
      - {series: 'ratchet_ingest_duplicates_total{namespace="ml"}', values: '0+0x30'}
      - {series: 'ratchet_ingest_records_total{namespace="other"}', values: '0+600x30'}
    alert_rule_test:
      - {alertname: RatchetReleaseDisagreement, eval_time: 20m, exp_alerts: []}
      - {alertname: RatchetServingAbsent, eval_time: 20m, exp_alerts: []}
    promql_expr_test:
      - expr: count by (alertname, namespace) (ALERTS{alertname="RatchetIngestAbsent", alertstate="firing"})
        eval_time: 20m
        exp_samples: [{labels: '{alertname="RatchetIngestAbsent", namespace="ml"}', value: 1}]
      - expr: ratchet:ingest_drain:seconds
        eval_time: 20m
        exp_samples: [{labels: 'ratchet:ingest_drain:seconds{namespace="ml"}', value: 60}]
      - expr: ratchet:ingest_quarantined:ratio_rate15m
        eval_time: 20m
        exp_samples: [{labels: 'ratchet:ingest_quarantined:ratio_rate15m{namespace="ml"}', value: 0.5}]
"""


def test_two_installations_do_not_page_for_each_other_nor_hide_what_is_absent(tmp_path: Path) -> None:
    spec = of_kind(render({"monitoring": {"rules": True}}), "PrometheusRule")[0]["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "test.yaml").write_text(SERIES)
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({}, set()),
        ({"ingest": {"enabled": False}}, {"RatchetIngestAbsent"}),
        ({"ingest": {"keda": {"enabled": True, "minReplicas": 0}}}, {"RatchetIngestAbsent"}),
        ({"updater": {"enabled": False}}, {"RatchetUpdaterAbsent"}),
        ({"maintain": {"enabled": False}}, {"RatchetMaintenanceAbsent"}),
    ],
)
def test_a_part_that_is_switched_off_is_not_missed(values: Any, missing: set[str]) -> None:
    made = {rule["alert"] for rule in rules_of(render({"monitoring": {"rules": True}}, values)) if "alert" in rule}
    every = {"RatchetServingAbsent", "RatchetIngestAbsent", "RatchetUpdaterAbsent", "RatchetMaintenanceAbsent"}
    assert {name for name in made if name.endswith("Absent")} == every - missing


def test_alerts_link_to_the_runbooks_and_every_dashboard_is_a_config_map(everything: list[dict[str, Any]]) -> None:
    alerts = [rule for rule in rules_of(everything) if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"https://git.example/runbooks/{alert['alert']}.md"
    found = {name: text for each in of_kind(everything, "ConfigMap") for name, text in each["data"].items()}
    paths = list((ROOT / "ops" / "dashboards" / "json").glob("*.json"))
    assert paths
    for path in paths:
        assert found[path.name].strip() == path.read_text().strip()
