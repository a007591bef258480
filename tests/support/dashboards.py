"""The Grafana dashboards of `ops/dashboards/json`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.support.pages import ROOT

BOARDS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "ops" / "dashboards" / "json").glob("*.json"))
}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
"""The panels with their dashboard, without the rows that group them."""


class Expression(NamedTuple):
    dashboard: str
    panel: str
    expr: str


EXPRESSIONS = [
    Expression(name, panel["title"], target["expr"]) for name, panel in PANELS for target in panel["targets"]
]
"""Panels with data once a sample was stored, an update judged and a request answered."""
