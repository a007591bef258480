"""The alert rules under promtool: they are valid, and fire exactly when they should.

Each case in the YAML files of this folder has its series and, per alert, the times at which it is silent or fires with
which labels and description; summary and page are those of the rule.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.alerts import FOLDER, rule_files, rule_groups

FILES = sorted(Path(__file__).parent.glob("*.yaml"))
SUMMARIES: dict[str, str] = {
    rule["alert"]: rule["annotations"]["summary"]
    for group in rule_groups()
    for rule in group["rules"]
    if "alert" in rule
}


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def checks(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for alert, times in case["alerts"].items():
        for time in times.pop("silent", ()):
            yield {"eval_time": time, "alertname": alert}
        for time, firing in times.items():
            yield {"eval_time": time, "alertname": alert, "exp_alerts": [expected(alert, each) for each in firing]}


def expected(alert: str, firing: dict[str, Any]) -> dict[str, Any]:
    labels = firing["labels"]
    summary = re.sub(r"\{\{ *\$labels\.(\w+) *\}\}", lambda found: str(labels[found[1]]), SUMMARIES[alert])
    texts = {"summary": summary, "description": firing["says"]}
    return {"exp_labels": labels, "exp_annotations": texts}


def cases_of(file: Path) -> dict[str, Any]:
    """A file of cases as promtool wants it."""
    told = yaml.safe_load(file.read_text())
    tests = [
        {
            "name": case["name"], "interval": case["interval"], "alert_rule_test": list(checks(case)),
            "input_series": [{"series": name, "values": str(values)} for name, values in case["series"].items()],
            "promql_expr_test": [
                {"expr": each["expr"], "eval_time": each["eval_time"],
                 "exp_samples": [{"labels": each["labels"], "value": each["value"]}]}
                for each in case.get("values", ())
            ],
        }
        for case in told["cases"]
    ]  # fmt: skip
    rules = [str(FOLDER / f"{name}.yaml") for name in told["rules"]]
    return {"rule_files": rules, "evaluation_interval": told["interval"], "tests": tests}


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", *rule_files())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_only_then(file: Path, tmp_path: Path) -> None:
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(cases_of(file)))
    promtool("test", "rules", tmp_path / "tests.yaml")


def test_the_cases_show_each_alert_firing_and_silent() -> None:
    told = [check for file in FILES for test in cases_of(file)["tests"] for check in test["alert_rule_test"]]
    shown = {(check["alertname"], "exp_alerts" in check) for check in told}
    assert shown == {(alert, fires) for alert in SUMMARIES for fires in (True, False)}
