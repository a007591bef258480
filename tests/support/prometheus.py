"""A real Prometheus and a real Alertmanager on free ports."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from core.addresses import free_port
from ops.alerts import as_yaml, rule_groups
from tests.support.downloads import answers, running

START_SECONDS = 60.0
GRAFANA = {"$__rate_interval": "10m", "$__range": "10m"}


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The current series of an expression with Grafana's variables filled in. Fails when Prometheus rejects it."""
        for variable, value in GRAFANA.items():
            expr = expr.replace(variable, value)
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", f"{expr}: {answer.get('error')}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def has_data(self, expr: str) -> bool:
        return any(not math.isnan(float(series["value"][1])) for series in self.query(expr))

    def rules(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/rules", timeout=30).json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    def healthy_targets(self) -> set[str]:
        answer = httpx.get(f"{self.url}/api/v1/targets", timeout=30).json()
        return {each["labels"]["process"] for each in answer["data"]["activeTargets"] if each["health"] == "up"}


@dataclass(frozen=True)
class Alertmanager:
    url: str

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def alerts(self) -> dict[str, dict[str, Any]]:
        found = httpx.get(f"{self.url}/api/v2/alerts", timeout=30).json()
        return {alert["labels"]["alertname"]: alert for alert in found}


def impatient_rules(file: Path, seconds: int) -> Path:
    """The rules of :mod:`ops.alerts`, but alerts wait at most ``seconds`` before they fire."""
    groups = rule_groups()
    for group in groups:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = f"{seconds}s"
    file.write_text(as_yaml({"groups": groups}))
    return file


@contextmanager
def prometheus(folder: Path, config: str, scrape_seconds: int = 1) -> Iterator[Prometheus]:
    """Start Prometheus with a printed configuration, changed only to scrape and evaluate more often."""
    told = yaml.safe_load(config)
    told["global"] = {"scrape_interval": f"{scrape_seconds}s", "evaluation_interval": f"{scrape_seconds}s"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(as_yaml(told))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with _running(command, folder / "prometheus.log", f"http://{address}/-/ready"):
        yield Prometheus(f"http://{address}")


@contextmanager
def alertmanager(folder: Path) -> Iterator[Alertmanager]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alertmanager.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager", f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alerts'}", f"--web.listen-address={address}", "--cluster.listen-address=",
        "--log.level=warn",
    ]  # fmt: skip
    with _running(command, folder / "alertmanager.log", f"http://{address}/-/ready"):
        yield Alertmanager(f"http://{address}")


def _running(command: list[str], log: Path, ready: str) -> AbstractContextManager[object]:
    environ = {**os.environ, "GOMAXPROCS": "1"}
    return running(command, log, lambda: answers(ready), START_SECONDS, env=environ)
