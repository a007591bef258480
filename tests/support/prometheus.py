"""A real Prometheus and a real Alertmanager on free ports."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from core.addresses import free_port
from ops.alerts import as_yaml, rule_groups
from tests.support.downloads import answers, running

START_SECONDS = 60.0
GRAFANA = {"$__rate_interval": "10m", "$__range": "10m", "$namespace": ".*"}


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The current series of an expression with Grafana's variables filled in. Fails when Prometheus rejects it."""
        for variable, value in GRAFANA.items():
            expr = expr.replace(variable, value)
        return list(self._asked("query", query=expr)["result"])

    def has_data(self, expr: str) -> bool:
        return any(not math.isnan(float(series["value"][1])) for series in self.query(expr))

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._asked("rules")["groups"] for rule in group["rules"]]

    def healthy_targets(self) -> set[str]:
        return {each["labels"]["process"] for each in self._asked("targets")["activeTargets"] if each["health"] == "up"}

    def _asked(self, what: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=params, timeout=30).json()
        assert answer["status"] == "success", f"{params}: {answer.get('error')}"
        return answer["data"]


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
    groups = rule_groups("https://example.com/docs/runbooks")
    for group in groups:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = f"{seconds}s"
    file.write_text(as_yaml({"groups": groups}))
    return file


@contextmanager
def prometheus(folder: Path, config: str) -> Iterator[Prometheus]:
    """Start Prometheus with a printed configuration, changed only to scrape and evaluate more often."""
    told = yaml.safe_load(config)
    told["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    with _started("prometheus", folder, as_yaml(told), f"--storage.tsdb.path={folder / 'series'}") as url:
        yield Prometheus(url)


@contextmanager
def alertmanager(folder: Path) -> Iterator[Alertmanager]:
    config = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"
    own = (f"--storage.path={folder / 'alerts'}", "--cluster.listen-address=")
    with _started("prometheus-alertmanager", folder, config, *own) as url:
        yield Alertmanager(url)


@contextmanager
def _started(program: str, folder: Path, config: str, *words: str) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{program}.yml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    url, log, environ = f"http://{address}", folder / f"{program}.log", {**os.environ, "GOMAXPROCS": "1"}
    command = [program, f"--config.file={folder / program}.yml", f"--web.listen-address={address}", "--log.level=warn"]
    with running([*command, *words], log, lambda: answers(f"{url}/-/ready"), START_SECONDS, env=environ):
        yield url
