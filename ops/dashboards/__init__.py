"""Grafana dashboards as code. The JSON that Grafana reads is beside, in ``json/``, and is committed.

    python -m ops.dashboards            # write the JSON again after a change
    python -m ops.dashboards --check    # say whether it is stale

Needs the ``dev`` extra (grafana-foundation-sdk). The JSON needs nothing: provision it, or import it by hand; each
dashboard asks for the Prometheus data source that it is to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from ops.dashboards import learning, overview, serving, stream

FOLDER = Path(__file__).with_name("json")
MAKERS = {
    "overview": overview.dashboard,
    "serving": serving.dashboard,
    "learning": learning.dashboard,
    "stream": stream.dashboard,
}


class Expression(NamedTuple):
    """One query of a panel."""

    dashboard: str
    panel: str
    expr: str


def render(name: str) -> str:
    """A dashboard's JSON, as it is committed."""
    board = MAKERS[name]().build()
    for number, panel in enumerate(board.panels or [], 1):
        panel.id_val = number
    return json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def panels(name: str) -> Iterator[dict[str, Any]]:
    """The panels of a dashboard, without the rows that group them."""
    for panel in json.loads(render(name))["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions() -> list[Expression]:
    """Every query of every panel. Each gives data once a sample was stored, an update judged and a request answered."""
    return [
        Expression(name, panel["title"], target["expr"])
        for name in MAKERS
        for panel in panels(name)
        for target in panel["targets"]
    ]


def stale() -> list[str]:
    """Names of dashboards whose committed JSON is not what :func:`render` makes."""
    return [name for name in MAKERS if not _file(name).exists() or _file(name).read_text() != render(name)]


def write() -> list[Path]:
    """Write the JSON of all dashboards."""
    FOLDER.mkdir(exist_ok=True)
    for name in MAKERS:
        _file(name).write_text(render(name))
    return [_file(name) for name in MAKERS]


def _file(name: str) -> Path:
    return FOLDER / f"{name}.json"
