"""The report's two plots as inline SVG, and helpers shared with the console's plots. Colours are CSS variables, so one
drawing serves dark and light. Style is in attributes, so that a page may forbid inline styles."""

from __future__ import annotations

import html
import io
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from updater.gate.verdict import MEAN

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
"""Marker colours that matplotlib writes, and the CSS variables that replace them."""
COLOURS = {"passed": GOOD, "failed": BAD, "inconclusive": OPEN}
WIDTH = 5.4
ROW = 0.42
_ONE_AT_A_TIME = threading.Lock()
"""matplotlib's settings are global."""


def forest(suites: Suites) -> str:
    """Each suite's difference in points with its interval, zero, and the margin of a retention suite."""
    plot, axes = _rows(suites)
    for y, suite in zip(reversed(range(len(suites))), suites, strict=True):
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
    axes.set_xlabel("← worse\u2003\u2003after − before, points\u2003\u2003better →", color=MUTED)
    return drawn(plot, "Difference of every suite with its interval and margin", "f")


def mean_row(mean: Mapping[str, Any]) -> dict[str, Any]:
    """The mean loss against the incumbent, as a row of :func:`forest`."""
    incumbent = next(iter(mean["references"].values()))
    return {**mean, **incumbent, "name": MEAN, "role": "retention", "difference_base": incumbent["difference"]}


def bars(suites: Suites) -> str:
    plot, axes = _rows(suites)
    for y, suite in zip(reversed(range(len(suites))), suites, strict=True):
        base = 100 * suite["base"]
        for offset, key, colour in ((0.19, "before", BEFORE), (-0.19, "after", COLOURS[suite["decision"]])):
            value = 100 * suite[key]
            axes.barh(y + offset, value, height=0.34, color=colour)
            place = max(value, base), y + offset
            axes.annotate(
                f"{value:.1f}", place, (4, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
            )
        axes.plot([base, base], [y - 0.4, y + 0.4], color=INK, linewidth=1.4)
    axes.set_xlim(0, max(10.0, 112 * max(max(s["before"], s["after"], s["base"]) for s in suites)))
    axes.set_xlabel("accuracy or recall, %", color=MUTED)
    return drawn(plot, "Score of every suite before and after", "b")


def _rows(suites: Suites) -> tuple[Figure, Any]:
    height = 0.55 + ROW * len(suites)
    plot = figure(height)
    axes = plot.add_axes((0.31, 0.52 / height, 0.67, 1 - 0.56 / height))
    names = [name if len(name) <= 26 else name[:25] + "…" for name in (suite["name"] for suite in suites)]
    axes.set_yticks(range(len(suites) - 1, -1, -1), names)
    axes.set_ylim(-0.6, len(suites) - 0.4)
    style(axes)
    return plot, axes


def figure(height: float, width: float = WIDTH) -> Figure:
    plot = Figure(figsize=(width, height))
    FigureCanvasSVG(plot)
    plot.patch.set_alpha(0)
    return plot


def style(axes: Any) -> None:
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=9.5)
    axes.tick_params(axis="x", length=0, colors=MUTED, labelsize=8.5)


def drawn(plot: Figure, title: str, prefix: str) -> str:
    """SVG text for inclusion in HTML: text stays text, ids start with ``prefix`` and depend only on the drawing."""
    stream = io.StringIO()
    with (
        _ONE_AT_A_TIME,
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}),
    ):
        plot.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    for marker, variable in VARIABLES.items():
        text = text.replace(marker, f"var({variable})")
    # matplotlib writes text without a fill in black, and pins a font: the page decides both
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'style="([^"]*)"', _attributes, text)
    shown = f'role="img" aria-label="{html.escape(title)}" stroke-linejoin="round" stroke-linecap="butt"'
    return text.replace("<svg ", f"<svg {shown} ", 1)


def _attributes(match: re.Match[str]) -> str:
    """`style="fill: red; stroke: blue"` as `fill="red" stroke="blue"`."""
    pairs = (part.partition(":") for part in match[1].split(";") if part.strip())
    named = ((name.strip(), value.strip()) for name, _, value in pairs)
    return " ".join(f'{name}="{value}"' for name, value in named if name != "font-family")
