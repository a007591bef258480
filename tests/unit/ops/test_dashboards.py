from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest

from core import metrics
from tests.support.dashboards import BOARDS, EXPRESSIONS, PANELS

MARKS = [each["expr"] for board in BOARDS.values() for each in board["annotations"]["list"]]
ASKED = sorted({*(each.expr for each in EXPRESSIONS), *MARKS})
"""All expressions: of panels, and of the annotations at releases."""


def test_a_panel_says_what_it_shows_in_which_unit_and_of_which_source() -> None:
    for name, panel in PANELS:
        where = f"{name}: {panel['title']}"
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        assert panel["targets"] and all(each["datasource"] == panel["datasource"] for each in panel["targets"]), where
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), where


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_begins_with_large_numbers_and_marks_releases(name: str) -> None:
    board = BOARDS[name]
    assert [panel["type"] for panel in board["panels"][:6]] == ["row", *["stat"] * 5]
    assert board["uid"] == f"ratchet-{name}" and "ratchet" in board["tags"]
    assert [(each["type"], each["query"]) for each in board["templating"]["list"]] == [("datasource", "prometheus")]
    assert [each["name"] for each in board["annotations"]["list"]] == ["Releases"]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_ids_of_their_own_titles_of_their_own_and_do_not_overlap(name: str) -> None:
    board: list[dict[str, Any]] = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    assert len({panel["title"] for panel in board}) == len(board)
    for one, other in combinations((panel["gridPos"] for panel in board), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in board) <= 24


def test_an_expression_names_only_metrics_and_labels_that_are_declared() -> None:
    known = metrics.names()
    for expr in ASKED:
        found = re.findall(r"\bratchet_[a-z0-9_]+", expr)
        assert found and set(found) <= set(known), expr
        labels = set().union(*(known[name] for name in found))
        for name, selector in re.findall(r"\b(ratchet_[a-z0-9_]+)\{([^}]*)\}", expr):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= known[name], expr
        for group in re.findall(r"\b(?:by|on|without) \(([^)]*)\)", expr):
            assert {label.strip() for label in group.split(",")} <= labels, expr
        assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}"), expr


def test_every_legend_names_labels_that_its_expression_keeps() -> None:
    for name, panel in PANELS:
        for target in panel["targets"]:
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label.strip() for group in groups for label in group.split(",")}
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= kept, f"{name}, {panel['title']}"


def test_counters_are_asked_for_by_rate_or_increase() -> None:
    for expr in ASKED:
        for counter in re.findall(r"\bratchet_[a-z0-9_]+_total\b", expr):
            whole = counter in ("ratchet_releases_total", "ratchet_guard_decisions_total")  # since serving started
            assert whole or re.search(rf"(rate|increase)\({counter}[{{\[]", expr), expr


def test_what_operators_ask_about_is_on_a_dashboard() -> None:
    shown = {name for expr in ASKED for name in re.findall(r"\bratchet_[a-z0-9_]+", expr)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics.names()}
    assert known == families
