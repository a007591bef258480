"""The alerting rules refer to existing metrics, and each has a page. Rules for all pages are in `test_docs.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from core import metrics
from core.metrics import declared
from ops.alerts import rule_groups
from ops.cli.main import app

PAGES = Path(__file__).resolve().parents[3] / "docs" / "runbooks"
RULES: list[dict[str, Any]] = [rule for group in rule_groups() for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})
SERIES = declared.names()
BUCKETS = {
    f"{each._name}_bucket": each._kwargs["buckets"] for each in vars(declared).values() if isinstance(each, Histogram)
}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ON_DEMAND = ("ratchet_http_requests_total", "ratchet_http_request_seconds")
"""Counters with too many label values to begin at 0: one event more or less makes no difference for them."""


def queries() -> list[str]:
    texts = [str(value) for rule in RULES for value in (rule["expr"], *rule.get("annotations", {}).values())]
    return texts + [page.read_text() for page in PAGES.glob("*.md")]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels'].get('window', '')}")
def test_an_alert_says_how_urgent_it_is_what_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"


def test_each_alert_has_a_page_each_page_an_alert_and_the_index_names_all() -> None:
    pages = sorted(page.stem for page in PAGES.glob("*.md") if page.name != "README.md")
    assert pages == NAMES
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", (PAGES / "README.md").read_text(), re.M) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_tells_meaning_sight_and_remedy(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert re.findall(r"^#+ (.*)$", text, re.M) == [name, "What it means", "How to see it", "What to do"]
    severities = sorted({rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == name})
    assert f"*{' or '.join(severities)}: " in text


def test_rules_and_pages_name_only_metrics_that_exist() -> None:
    for query in queries():
        for name in re.findall(r"\bratchet_[a-z_0-9]+\b", query):
            assert any(known.startswith(name) for known in SERIES), name
        for name in re.findall(r"\bratchet:[a-z_]+:[a-z_0-9]+\b", query):
            assert name in RECORDED, name


def test_rules_name_only_series_labels_and_buckets_that_exist() -> None:
    for rule in RULES:
        assert set(re.findall(r"\bratchet_[a-z_0-9]+\b", rule["expr"])) <= set(SERIES)
        for name, selectors in re.findall(r"\b(ratchet_[a-z_0-9]+)\{([^}]*)\}", rule["expr"]):
            labels = dict(re.findall(r'(\w+)[=!]~?"([^"]*)"', selectors))
            assert set(labels) <= SERIES[name], (name, labels)
            if "le" in labels:
                assert float(labels["le"]) in BUCKETS[name], (name, labels)


def test_a_counter_whose_growth_is_watched_starts_at_zero() -> None:
    exported = [
        sample
        for part in (*metrics.NAME_PREFIXES, "serve")
        for each in text_string_to_metric_families(metrics.exposition(part).decode())
        for sample in each.samples
    ]
    growth = [
        found for rule in RULES for found in re.findall(r"(?:increase|rate)\((\w+)(?:\{(.*?)\})?\[", rule["expr"])
    ]
    assert len(growth) > 10
    for name, selectors in growth:
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', selectors))
        there = [each for each in exported if each.name == name and wanted.items() <= each.labels.items()]
        assert there or name.startswith(ON_DEMAND), (name, selectors)


def test_printed_rules_link_to_the_pages_where_they_are() -> None:
    done = CliRunner().invoke(app, ["metrics", "rules", "--runbooks", "https://example.com/runbooks/"])
    groups = yaml.safe_load(done.stdout)["groups"]
    links = {rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert links == {f"https://example.com/runbooks/{name}.md" for name in NAMES}
    assert [group["name"] for group in groups] == [group["name"] for group in rule_groups()]
