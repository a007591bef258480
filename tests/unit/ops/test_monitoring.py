"""Alerting rules, their pages and the dashboards refer to metrics, labels and buckets that exist."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from core import metrics
from core.metrics import declared
from ops.alerts import rule_groups
from ops.cli.main import app
from tests.support.dashboards import BOARDS, EXPRESSIONS, PANELS

PAGES = Path(__file__).resolve().parents[3] / "docs" / "runbooks"
RULES: list[dict[str, Any]] = [rule for group in rule_groups() for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})
SERIES = declared.names()
BUCKETS = {
    f"{each._name}_bucket": each._kwargs["buckets"] for each in vars(declared).values() if isinstance(each, Histogram)
}
METRIC = r"\bratchet_[a-z_0-9]+"
MACHINES = {
    "process_resident_memory_bytes", "ray_component_rss_bytes", "ray_node_gpus_utilization", "ray_node_gram_used",
}  # fmt: skip
"""Metrics of Prometheus' client and of Ray that dashboards show."""
ASKED = sorted(
    {each.expr for each in EXPRESSIONS}
    | {each["expr"] for board in BOARDS.values() for each in board["annotations"]["list"]}
)
"""All expressions of dashboards: of panels, and of the annotations at releases."""
ON_DEMAND = ("ratchet_http_requests_total", "ratchet_http_request_seconds")
"""Counters with too many label values to begin at 0: one event more or less makes no difference for them."""


def test_each_alert_says_how_urgent_it_is_and_has_a_page_with_meaning_sight_and_remedy() -> None:
    for rule in ALERTS:
        assert set(rule["annotations"]) == {"summary", "description"}, "a link needs a URL: rule_groups"
    assert sorted(page.stem for page in PAGES.glob("*.md") if page.name != "README.md") == NAMES
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", (PAGES / "README.md").read_text(), re.M) == NAMES
    for name in NAMES:
        text = (PAGES / f"{name}.md").read_text()
        assert re.findall(r"^#+ (.*)$", text, re.M) == [name, "What it means", "How to see it", "What to do"]
        severities = sorted({rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == name})
        assert set(severities) <= {"page", "ticket"} and f"*{' or '.join(severities)}: " in text


def test_rules_and_pages_name_only_metrics_labels_and_buckets_that_exist() -> None:
    texts = [str(value) for rule in RULES for value in (rule["expr"], *rule.get("annotations", {}).values())]
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for text in (*texts, *(page.read_text() for page in PAGES.glob("*.md"))):
        for name in re.findall(METRIC, text):
            assert any(known.startswith(name) for known in SERIES), name
        assert set(re.findall(r"\bratchet:[a-z_]+:[a-z_0-9]+\b", text)) <= recorded
    for rule in RULES:
        assert set(re.findall(METRIC, rule["expr"])) <= set(SERIES)
        for name, selectors in re.findall(r"\b(ratchet_[a-z_0-9]+)\{([^}]*)\}", rule["expr"]):
            labels = dict(re.findall(r'(\w+)[=!]~?"([^"]*)"', selectors))
            assert set(labels) <= SERIES[name], (name, labels)
            assert "le" not in labels or float(labels["le"]) in BUCKETS[name], (name, labels)


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
    rules = [rule for group in yaml.safe_load(done.stdout)["groups"] for rule in group["rules"]]
    assert [rule.get("alert") for rule in rules] == [rule.get("alert") for rule in RULES]
    links = {rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule}
    assert links == {f"https://example.com/runbooks/{name}.md" for name in NAMES}


# Dashboards


def test_a_panel_says_what_it_shows_in_which_unit_and_of_which_source() -> None:
    for name, panel in PANELS:
        where = f"{name}: {panel['title']}"
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), where
        told = panel["fieldConfig"]["defaults"]
        a_number = any(re.search("release_live|guard_release", target["expr"]) for target in panel["targets"])
        assert told["unit"] != "none" or a_number or told["mappings"], f"{where}: a release's number or a named state"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        assert panel["targets"] and all(each["datasource"] == panel["datasource"] for each in panel["targets"]), where
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), where
        for target in panel["targets"]:
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label.strip() for group in groups for label in group.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, where


def test_a_dashboard_has_its_own_name_and_panels_that_do_not_overlap() -> None:
    for name, board in BOARDS.items():
        panels = board["panels"]
        assert board["uid"] == f"ratchet-{name}" and "ratchet" in board["tags"]
        variables = {each["name"]: each for each in board["templating"]["list"]}
        assert variables["datasource"]["query"] == "prometheus" and variables.keys() == {"datasource", "namespace"}
        assert variables["namespace"]["allValue"] == ".*", "series of one machine have no such label"
        assert [each["name"] for each in board["annotations"]["list"]] == ["Releases"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        for one, other in combinations((panel["gridPos"] for panel in panels), 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"], name


def test_dashboards_show_every_metric_and_ask_only_for_metrics_and_labels_that_are_declared() -> None:
    shown = set()
    for expr in ASKED:
        scoped = r'\b((?:ratchet|process|ray)_\w+)(\{namespace=~"\$namespace"[,}])?'
        assert all(scope for _, scope in re.findall(scoped, expr)), expr
        if set(re.findall(r"\b(?:process|ray)_\w+", expr)) & MACHINES:
            continue
        found = set(re.findall(METRIC, expr))
        shown |= found
        assert found and found <= set(SERIES), expr
        labels = set().union(*(SERIES[name] for name in found))
        for name, selector in re.findall(r"\b(ratchet_[a-z0-9_]+)\{([^}]*)\}", expr):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= {*SERIES[name], "namespace"}, expr
        for group in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", expr):
            assert {label.strip() for label in group.split(",")} <= labels, expr
        for counter in re.findall(rf"{METRIC}_total\b", expr):
            whole = counter in ("ratchet_releases_total", "ratchet_guard_decisions_total")  # since serving started
            assert whole or re.search(rf"(rate|increase)\({counter}[{{\[]", expr), expr
    part = r"_(bucket|sum|count)$"
    assert {re.sub(part, "", name) for name in shown} == {re.sub(part, "", name) for name in SERIES}
