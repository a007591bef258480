"""Plot of power against suite size and margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

PAPER, INK, MUTED, LINE = "#ffffff", "#1a211d", "#5c6660", "#e0e5dd"
COLOURS = ("#b23232", "#d98032", "#9a8a10", "#17704a", "#1f5fa8")
"""From the smallest margin to the largest."""
TITLES = {"retrieval": "Retrieval, recall@5 both ways", "classification": "Classification, accuracy"}
AIM = 0.8


def draw(power: Sequence[Mapping[str, Any]], shipped: Mapping[str, Sequence[int]], path: Path) -> Path:
    """Write a PNG. ``shipped``: sizes of the built-in suites, by task, which are marked on the axis."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in power))
    figure = Figure(figsize=(5.0 * len(tasks) + 1.2, 3.9), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        own = [row for row in power if row["task"] == task]
        sizes = sorted({int(row["items"]) for row in own})
        margins = sorted({float(row["margin"]) for row in own})
        for colour, margin in zip(COLOURS, margins, strict=False):
            line = sorted((int(r["items"]), 100 * float(r["power"])) for r in own if r["margin"] == margin)
            axes.plot(*zip(*line, strict=True), "o-", color=colour, linewidth=2, markersize=4,
                      label=f"{100 * margin:.0f} points")  # fmt: skip
        axes.axhline(100 * AIM, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(shipped.get(task, []), [0] * len(shipped.get(task, [])), "^", color=INK, markersize=7,
                  clip_on=False, zorder=5, label="shipped suites")  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(0, 101)
        axes.set_xlabel("items in the suite", color=MUTED)
        axes.set_title(TITLES.get(task, task), color=INK, fontsize=11, loc="left")
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, colors=MUTED, labelsize=8.5)
    first = figure.axes[0]
    first.set_ylabel("shown to be inside the margin, %", color=MUTED)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, title="margin", loc="outside right upper", frameon=False, fontsize=8.5,
                title_fontsize=8.5, labelcolor=INK)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
