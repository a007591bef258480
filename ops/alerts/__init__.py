"""Alerting and recording rules for Prometheus, and the configuration that makes it scrape Ratchet.

The rules are the YAML files of this folder, one for each topic. Every alert has a severity (``page``: somebody must
act now; ``ticket``: within days), values in its description, and a page in ``docs/runbooks``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ops.settings import Settings

FOLDER = Path(__file__).parent
SCRAPE_SECONDS = 15
"""How often targets are scraped and rules evaluated. The shortest window of a rule (5 minutes) holds 20 scrapes."""


def rule_files() -> list[Path]:
    """The files with rules."""
    return sorted(FOLDER.glob("*.yaml"))


def rule_groups(runbooks: str = "") -> list[dict[str, Any]]:
    """The groups of all files. ``runbooks``: URL of the folder with the pages, for links that lead there."""
    groups = [group for file in rule_files() for group in yaml.safe_load(file.read_text())["groups"]]
    for group in groups:
        for rule in group["rules"]:
            if "alert" in rule and runbooks:
                page = f"{runbooks.rstrip('/')}/{rule['alert']}.md"
                rule["annotations"] = {**rule["annotations"], "runbook_url": page}
    return groups


def prometheus_config(
    settings: Settings, *, alertmanagers: list[str] | None = None, rules: list[str] | None = None
) -> dict[str, Any]:
    """What ``prometheus.yml`` holds for a Ratchet with these settings: a job for each part that exports metrics.

    Args:
        alertmanagers: host:port of each Alertmanager.
        rules: rule files to load; by default those of this folder.
    """
    ports = {
        "ratchet-serve": (_reachable(settings.serve.host), settings.serve.port),
        "ratchet-ingest": ("127.0.0.1", settings.ingest.metrics_port),
        "ratchet-update": ("127.0.0.1", settings.updater.metrics_port),
    }
    config: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": rules or [str(file) for file in rule_files()],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"{host}:{port}"]}]}
            for job, (host, port) in ports.items()
            if port
        ],
    }
    if alertmanagers:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": alertmanagers}]}]}
    return config


def as_yaml(value: Any) -> str:
    """YAML in the order given, without anchors: some readers of rules do not follow them."""
    return yaml.dump(value, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _reachable(host: str) -> str:
    """The address to connect to, of one to listen on."""
    if host in ("0.0.0.0", "::"):  # noqa: S104
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
