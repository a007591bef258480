"""Medians, ratios and a table from the turns of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.encode.grid import Cell
from benchmarks.encode.peers.servers import OPENVINO_RAW
from benchmarks.encode.sides import Turn
from serving.messages import Modality

OURS, RAW = "ratchet", ("raw", OPENVINO_RAW)
CPU_CELL = Cell("image", 1, 8)
"""The cell of ``cpu_ms_per_request``: single images, at a concurrency that leaves nothing idle."""


@dataclass(frozen=True)
class CellFigures:
    """One model, one cell, all sides."""

    model: str
    cell: Cell
    sides: Mapping[str, Mapping[str, Any]]

    def ratio(self, other: str) -> float | None:
        """Ratchet's requests a second over another side's; None if one of them is not measured."""
        if OURS not in self.sides or other not in self.sides:
            return None
        theirs: float = self.sides[other]["requests_per_second"]
        return self.sides[OURS]["requests_per_second"] / theirs if theirs else None

    def to_json(self) -> dict[str, Any]:
        ratios = {f"to_{side}": rounded(self.ratio(side)) for side in self.sides if side != OURS}
        cell = {"kind": self.cell.kind, "items": self.cell.items, "concurrency": self.cell.concurrency}
        return {"model": self.model, **cell, **ratios, "sides": self.sides}


def cell_figures(model: str, cell: Cell, turns: Mapping[str, Sequence[Turn]]) -> CellFigures:
    return CellFigures(model, cell, {side: _side(cell, rows) for side, rows in turns.items() if rows})


def _side(cell: Cell, turns: Sequence[Turn]) -> dict[str, Any]:
    rate = median(turn.rate for turn in turns)
    figures: dict[str, Any] = {
        "requests_per_second": round(rate, 3), "items_per_second": round(rate * cell.items, 2),
        "p50": rounded(median(turn.p50 for turn in turns), 4), "p99": rounded(median(turn.p99 for turn in turns), 4),
        "requests": sum(turn.requests for turn in turns), "failed": sum(turn.failed for turn in turns),
        "problems": [problem for turn in turns for problem in turn.problems][:3],
    }  # fmt: skip
    outside = [turn.outside_ms for turn in turns if turn.outside_ms is not None]
    if outside:
        figures["cpu_ms_per_request"] = round(median(outside), 2)
    return figures


def ratios(cells: Iterable[CellFigures]) -> dict[str, float | None]:
    """The required ratios of one model's cells; each is the worst over its cells."""
    rows = list(cells)

    def worst(kind: Modality, *sides: str, items: int | None = None, concurrency: int | None = None) -> float | None:
        values = [
            ratio
            for row in rows
            for side in sides
            if row.cell.kind == kind
            and items in (None, row.cell.items)
            and concurrency in (None, row.cell.concurrency)
            and (ratio := row.ratio(side)) is not None
        ]
        return rounded(min(values, default=None))

    return {
        "image_to_infinity_min": worst("image", "infinity"),
        "text_to_infinity_min": worst("text", "infinity"),
        "image_to_mosec_min": worst("image", "mosec"),
        "text_to_mosec_min": worst("text", "mosec"),
        "image_16_to_raw": worst("image", *RAW, items=16),
        "image_c32_to_raw": worst("image", *RAW, items=1, concurrency=32),
        "text_16_to_raw": worst("text", *RAW, items=16),
        "text_c1_to_raw": worst("text", *RAW, items=1, concurrency=1),
    }


def cpu_ms_per_request(cells: Iterable[CellFigures]) -> float | None:
    """CPU time of the server's processes without its encoders, in :data:`CPU_CELL` or else in the first cell that has
    it.
    """
    rows = [row for row in cells if "cpu_ms_per_request" in row.sides.get(OURS, {})]
    rows.sort(key=lambda row: row.cell != CPU_CELL)
    return rows[0].sides[OURS]["cpu_ms_per_request"] if rows else None


def rounded(value: float | None, digits: int = 3) -> float | None:
    """None for missing values and NaN, which JSON lacks."""
    return None if value is None or math.isnan(value) else round(value, digits)


def show(figures: dict[str, Any]) -> None:
    console = Console()
    for model in dict.fromkeys(row["model"] for row in figures["cells"]):
        console.print(_table(model, [row for row in figures["cells"] if row["model"] == model]))
    print(json.dumps(figures), flush=True)


def _table(model: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    sides = list(dict.fromkeys(side for row in rows for side in row["sides"]))
    others = [side for side in sides if side != OURS]
    title = f"{model}: inputs a second (p50 / p99 in ms)"
    table = Table("", "inputs", "at once", *sides, *(f"of {side}" for side in others), title=title)
    for row in rows:
        shown = [_shown(row["sides"].get(side)) for side in sides]
        compared = ["" if row.get(f"to_{side}") is None else f"{row[f'to_{side}']:.2f}" for side in others]
        table.add_row(row["kind"], str(row["items"]), str(row["concurrency"]), *shown, *compared)
    return table


def _shown(side: Mapping[str, Any] | None) -> str:
    if side is None:
        return ""
    latency = "" if side["p50"] is None else f" ({1000 * side['p50']:.0f} / {1000 * side['p99']:.0f})"
    failed = f" [red]{side['failed']} failed[/red]" if side["failed"] else ""
    return f"{side['items_per_second']:.1f}{latency}{failed}"
