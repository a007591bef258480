"""Alerting and recording rules (this folder's YAML files) and scrape configuration for Prometheus. Every alert has a
severity (``page``: act now; ``ticket``: within days) and a page in ``docs/runbooks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

FOLDER = Path(__file__).parent
SCRAPE_SECONDS = 15
"""Interval of scrapes and rule evaluation: the shortest window of a rule (5 minutes) holds 20 scrapes."""


class Target(TypedDict):
    targets: list[str]
    labels: dict[str, str]


def rule_files() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def rule_groups(runbooks: str = "") -> list[dict[str, Any]]:
    """The groups of all files. ``runbooks``: URL of a copy of ``docs/runbooks``, to whose pages alerts then link."""
    groups = [group for file in rule_files() for group in yaml.safe_load(file.read_text())["groups"]]
    for group in groups:
        for rule in group["rules"]:
            if "alert" in rule and runbooks:
                page = f"{runbooks.rstrip('/')}/{rule['alert']}.md"
                rule["annotations"] = {**rule["annotations"], "runbook_url": page}
    return groups


def prometheus_config(
    targets: Sequence[Target], *, alertmanagers: Sequence[str] | None = None, rules: Sequence[str] | None = None
) -> dict[str, Any]:
    """The contents of ``prometheus.yml``. ``alertmanagers``: host:port of each; ``rules``: default: shipped files."""
    config: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": list(rules or map(str, rule_files())),
        "scrape_configs": [{"job_name": "ratchet", "static_configs": list(targets)}],
    }
    if alertmanagers:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": list(alertmanagers)}]}]}
    return config


def as_yaml(value: Any) -> str:
    """YAML in the given order, without anchors, which some readers of rules do not support."""
    return yaml.dump(value, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
