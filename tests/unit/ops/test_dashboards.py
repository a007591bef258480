"""The dashboards: the committed JSON is what the code makes; every panel says what it is and asks for what exists."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from core import metrics
from ops import dashboards

EXPRESSIONS = dashboards.expressions()
ALL = [(name, panel) for name in dashboards.MAKERS for panel in dashboards.panels(name)]


def ids(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{name}: {panel['title']}" for name, panel in cases]


def test_the_committed_json_is_not_stale() -> None:
    assert not dashboards.stale(), "run `python -m ops.dashboards`, and commit what it writes"


def test_a_change_makes_it_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dashboards.overview.dashboard().description("another one")
    monkeypatch.setitem(dashboards.MAKERS, "overview", lambda: changed)
    assert dashboards.stale() == ["overview"]


@pytest.mark.parametrize(("name", "panel"), ALL, ids=ids(ALL))
def test_a_panel_says_what_it_shows_in_which_unit_and_of_which_source(name: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20 and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["expr"] and target["datasource"] == panel["datasource"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("name", dashboards.MAKERS)
def test_a_dashboard_begins_with_large_numbers_and_marks_releases(name: str) -> None:
    board = json.loads(dashboards.render(name))
    assert [panel["type"] for panel in board["panels"][:6]] == ["row", *["stat"] * 5]
    assert board["uid"] == f"ratchet-{name}" and "ratchet" in board["tags"]
    assert [(each["type"], each["query"]) for each in board["templating"]["list"]] == [("datasource", "prometheus")]
    assert [each["name"] for each in board["annotations"]["list"]] == ["Releases"]


@pytest.mark.parametrize("name", dashboards.MAKERS)
def test_panels_have_ids_of_their_own_titles_of_their_own_and_do_not_overlap(name: str) -> None:
    board = json.loads(dashboards.render(name))["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    assert len({panel["title"] for panel in board}) == len(board)
    for one, other in combinations((panel["gridPos"] for panel in board), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in board) <= 24


def asked() -> list[str]:
    """All expressions: of panels, and of the marks at releases."""
    marks = [each["expr"] for name in dashboards.MAKERS for each in _annotations(name)]
    return [each.expr for each in EXPRESSIONS] + marks


def _annotations(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboards.render(name))["annotations"]["list"]
    return found


@pytest.mark.parametrize("expr", sorted(set(asked())))
def test_an_expression_names_only_metrics_and_labels_that_are_declared(expr: str) -> None:
    known = metrics.names()
    found = re.findall(r"\bratchet_[a-z0-9_]+", expr)
    assert found
    assert set(found) <= set(known)
    labels = set().union(*(known[name] for name in found))
    for name, selector in re.findall(r"\b(ratchet_[a-z0-9_]+)\{([^}]*)\}", expr):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= known[name]
    for group in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", expr):
        assert {label.strip() for label in group.split(",")} <= labels
    assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}")


def test_every_legend_names_labels_that_its_expression_keeps() -> None:
    for name, panel in ALL:
        for target in panel["targets"]:
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label.strip() for group in groups for label in group.split(",")}
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= kept, f"{name}, {panel['title']}"


def test_counters_are_asked_for_by_rate_or_increase() -> None:
    for expr in asked():
        for counter in re.findall(r"\bratchet_[a-z0-9_]+_total\b", expr):
            whole = counter in ("ratchet_releases_total", "ratchet_guard_decisions_total")  # since serving started
            assert whole or re.search(rf"(rate|increase)\({counter}[{{\[]", expr), expr


def test_what_operators_ask_about_is_on_a_dashboard() -> None:
    shown = {name for expr in asked() for name in re.findall(r"\bratchet_[a-z0-9_]+", expr)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics.names()}
    assert known == families
