"""The report's two plots as inline SVG. Colours are CSS variables, so one drawing serves dark and light."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Suites = Sequence[Mapping[str, Any]]

INK, MUTED, LINE = "#010101", "#020202", "#030303"
GOOD, BAD, OPEN, BEFORE = "#040404", "#050505", "#060606", "#070707"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    GOOD: "--good",
    BAD: "--bad",
    OPEN: "--open",
    BEFORE: "--before",
}
"""Marker colours that matplotlib writes, and the CSS variables that take their place."""
COLOURS = {"passed": GOOD, "failed": BAD, "inconclusive": OPEN}
WIDTH = 5.4
"""Inches; the page scales the drawing to its own width."""
ROW = 0.42
"""Inches of height for one suite."""


def forest(suites: Suites) -> str:
    """Each suite's difference in points with its interval, zero, and the margin of a retention suite."""
    height = 0.55 + ROW * len(suites)
    figure = _figure(height)
    axes = figure.add_axes((0.31, 0.52 / height, 0.67, 1 - 0.56 / height))
    for row, suite in enumerate(suites):
        y = len(suites) - 1 - row
        colour = COLOURS[suite["decision"]]
        middle, low, high = (100 * suite[key] for key in ("difference", "ci_low", "ci_high"))
        if suite["role"] == "retention":
            edge = -100 * suite["margin"]
            axes.plot([edge, edge], [y - 0.38, y + 0.38], color=BAD, linewidth=1.6, linestyle=(0, (2, 1.5)))
        if abs(suite["difference_base"] - suite["difference"]) > 1e-9:
            below = [100 * suite[key] for key in ("ci_base_low", "ci_base_high")]
            axes.plot(below, [y - 0.2, y - 0.2], color=MUTED, linewidth=1.2)
            axes.plot(100 * suite["difference_base"], y - 0.2, "D", color=MUTED, markersize=3)
        axes.plot([low, high], [y, y], color=colour, linewidth=2.6, solid_capstyle="round")
        axes.plot(middle, y, "o", color=colour, markersize=6.5)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(suites) - 1, -1, -1), [_label(suite["name"]) for suite in suites])
    axes.set_ylim(-0.6, len(suites) - 0.4)
    axes.set_xlabel("after − before, points", color=MUTED)
    _style(axes)
    return _svg(figure, "Difference of every suite with its interval and margin")


def bars(suites: Suites) -> str:
    """Score of the incumbent and of the candidate, per suite, with the base as a tick."""
    height = 0.55 + ROW * len(suites)
    figure = _figure(height)
    axes = figure.add_axes((0.31, 0.52 / height, 0.67, 1 - 0.56 / height))
    for row, suite in enumerate(suites):
        y = len(suites) - 1 - row
        axes.barh(y + 0.19, 100 * suite["before"], height=0.34, color=BEFORE)
        axes.barh(y - 0.19, 100 * suite["after"], height=0.34, color=COLOURS[suite["decision"]])
        axes.plot([100 * suite["base"]] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=1.4)
        for offset, key in ((0.19, "before"), (-0.19, "after")):
            value = 100 * suite[key]
            axes.annotate(
                f"{value:.1f}",
                (max(value, 100 * suite["base"]), y + offset),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=MUTED,
            )
    axes.set_yticks(range(len(suites) - 1, -1, -1), [_label(suite["name"]) for suite in suites])
    axes.set_ylim(-0.6, len(suites) - 0.4)
    axes.set_xlim(0, max(10.0, 112 * max(max(s["before"], s["after"], s["base"]) for s in suites)))
    axes.set_xlabel("accuracy or recall, %", color=MUTED)
    _style(axes)
    return _svg(figure, "Score of every suite before and after")


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure


def _style(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=9.5)
    axes.tick_params(axis="x", length=0, colors=MUTED, labelsize=8.5)


def _label(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _svg(figure: Figure, title: str) -> str:
    """SVG text for inclusion in HTML: text stays text, ids are the same for the same drawing."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for marker, variable in VARIABLES.items():
        text = text.replace(marker, f"var({variable})")
    # matplotlib writes text without a fill in black, and pins a font: the page decides both
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    ids = "f" if "Difference" in title else "b"
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{ids}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
