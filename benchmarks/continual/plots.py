"""Plots of the results, SVG for light and dark backgrounds, in the colours of the gate's report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from benchmarks.continual.protocol import STANDARDS
from updater.gate.plots import BAD, BEFORE, GOOD, INK, LINE, MUTED, OPEN, drawn, figure, style

WIDTH, HEIGHT = 7.2, 4.4
FAR = 15.0
"""Methods further below zero-shot than this many points of GM are left out, because they would compress the axis."""
LABELLED = 6
"""Methods that are labelled: the best ones, and the two that readers look for."""
ALWAYS = (*STANDARDS, "naive", "replay", "zscl", "full")
LABEL: dict[str, Any] = {
    "fontsize": 8.5,
    "color": INK,
    "arrowprops": {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2},
}


def all_plots(outcome: dict[str, Any]) -> dict[str, str]:
    everything = outcome["methods"]
    methods = {name: m for name, m in everything.items() if name in STANDARDS or m["geometric_mean_delta"] > -FAR}
    far = [f"{name} ({m['geometric_mean_delta']:+.0f})" for name, m in everything.items() if name not in methods]
    below = f"far below, and not drawn: {', '.join(far)}" if far else ""
    plots = {
        "trajectories.svg": _trajectories(methods, outcome["updates"], below),
        "retention.svg": _retention(methods, below),
        "cost.svg": _cost(methods, below),
    }
    budgets = outcome.get("budgets", {})
    return plots | ({"budgets.svg": _budgets(budgets)} if len(budgets) > 1 else {})


def _named(methods: dict[str, Any]) -> list[str]:
    best = list(methods)[:LABELLED]
    return best + [name for name in ALWAYS if name in methods and name not in best]


def _colour(name: str, methods: dict[str, Any]) -> str:
    if name in STANDARDS:
        return INK
    if name == "naive":
        return BAD
    return GOOD if methods[name]["intervals"]["gm"]["low"] > 0 else OPEN


def _trajectories(methods: dict[str, Any], updates: int, below: str) -> str:
    plot = figure(HEIGHT, WIDTH)
    axes = plot.add_axes((0.09, 0.13, 0.7, 0.83))
    named = _named(methods)
    for name in sorted(methods, key=named.__contains__):
        line = methods[name]["trajectory"]["geometric_mean"]
        colour = _colour(name, methods) if name in named else BEFORE
        axes.plot(range(updates + 1), line, color=colour, linewidth=1.8 if name in named else 0.8)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.set_xlim(0, updates)
    ends = {name: (float(updates), methods[name]["trajectory"]["geometric_mean"][-1]) for name in named}
    for name, y in _heights(axes, ends, 1.0).items():
        axes.annotate(name, ends[name], (updates * 1.04, y), va="center", annotation_clip=False, **LABEL)
    axes.set_xlabel("updates", color=MUTED)
    axes.set_ylabel("geometric mean − zero-shot, points", color=MUTED)
    return _finished(plot, axes, "Geometric mean along the stream, against zero-shot", "t", below)


def _retention(methods: dict[str, Any], below: str) -> str:
    plot = figure(HEIGHT, WIDTH)
    axes = plot.add_axes((0.09, 0.13, 0.88, 0.83))
    named = _named(methods)
    for name, method in methods.items():
        x, y = (method["intervals"][key] for key in ("a_ka", "a_zs"))
        colour = _colour(name, methods)
        axes.plot([x["low"], x["high"]], [y["value"]] * 2, color=colour, linewidth=0.9, alpha=0.5)
        axes.plot([x["value"]] * 2, [y["low"], y["high"]], color=colour, linewidth=0.9, alpha=0.5)
        axes.plot(x["value"], y["value"], "o", color=colour, markersize=6 if name in named else 4)
    points = {name: (methods[name]["a_ka_delta"], methods[name]["a_zs_delta"]) for name in named}
    _name_points(axes, points)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    axes.set_xlabel("learned: adaptation suites − zero-shot, points", color=MUTED)
    axes.set_ylabel("kept: held-out suites − zero-shot, points", color=MUTED)
    return _finished(plot, axes, "What was kept against what was learned", "r", below)


def _budgets(budgets: dict[str, dict[str, dict[str, float]]]) -> str:
    """A line for each method that was run at every budget, from the smallest to the largest one, which is named."""
    plot = figure(HEIGHT, WIDTH)
    axes = plot.add_axes((0.09, 0.13, 0.88, 0.83))
    everywhere = [name for name in list(budgets.values())[-1] if all(name in methods for methods in budgets.values())]
    points = {}
    for name in everywhere:
        xs, ys = zip(*((methods[name]["a_ka"], methods[name]["a_zs"]) for methods in budgets.values()), strict=True)
        colour = INK if name in STANDARDS else OPEN
        axes.plot(xs, ys, color=colour, linewidth=1.8 if name in STANDARDS else 0.9)
        for size, x, y in zip((3, 5, 7, 9), xs, ys, strict=False):
            axes.plot(x, y, "o", color=colour, markersize=size)
        points[name] = (xs[-1], ys[-1])
    _name_points(axes, points)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.axvline(0, color=MUTED, linewidth=0.9)
    axes.set_xlabel("learned: adaptation suites − zero-shot, points", color=MUTED)
    axes.set_ylabel("kept: held-out suites − zero-shot, points", color=MUTED)
    sizes = ", ".join(f"× {budget}" for budget in budgets)
    return _finished(plot, axes, "Kept against learned by budget", "b", f"dots from small to large: budgets {sizes}")


def _cost(methods: dict[str, Any], below: str) -> str:
    plot = figure(HEIGHT, WIDTH)
    axes = plot.add_axes((0.09, 0.13, 0.88, 0.83))
    named = _named(methods)
    for name, method in methods.items():
        gm = method["intervals"]["gm"]
        colour = _colour(name, methods)
        axes.plot([method["cpu_seconds"]] * 2, [gm["low"], gm["high"]], color=colour, linewidth=0.9, alpha=0.5)
        axes.plot(method["cpu_seconds"], gm["value"], "o", color=colour, markersize=6 if name in named else 4)
    axes.axhline(0, color=MUTED, linewidth=0.9)
    axes.set_xlim(left=0)
    points = {name: (methods[name]["cpu_seconds"], methods[name]["geometric_mean_delta"]) for name in named}
    _name_points(axes, points)
    axes.set_xlabel("CPU seconds of training, whole stream", color=MUTED)
    axes.set_ylabel("geometric mean − zero-shot, points", color=MUTED)
    return _finished(plot, axes, "Geometric mean against the time that training took", "c", below)


def _name_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    left, right = axes.get_xlim()
    width = right - left
    heights = _heights(axes, points, 0.2 * width)
    for name, (x, y) in points.items():
        beyond = x > left + 0.8 * width
        position = (x - 0.02 * width if beyond else x + 0.02 * width, heights[name])
        axes.annotate(name, (x, y), position, va="center", ha="right" if beyond else "left", **LABEL)


def _heights(axes: Any, points: dict[str, tuple[float, float]], near: float) -> dict[str, float]:
    """Heights of the labels of points; the axes are made to include them."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.05
    heights = _apart(points, near, gap)
    axes.set_ylim(min(low, *(y - gap for y in heights.values())), max(high, *(y + gap for y in heights.values())))
    return heights


def _apart(points: dict[str, tuple[float, float]], near: float, gap: float) -> dict[str, float]:
    """Heights of the points, moved so that those nearer than ``near`` horizontally are ``gap`` apart vertically."""
    names = sorted(points, key=lambda name: points[name][1])
    heights = {name: points[name][1] for name in names}
    for _ in range(100):
        for place, lower in enumerate(names):
            for upper in names[place + 1 :]:
                missing = gap - (heights[upper] - heights[lower])
                if missing > 0 and abs(points[upper][0] - points[lower][0]) < near:
                    heights[lower] -= missing / 2
                    heights[upper] += missing / 2
    return heights


def _finished(plot: Any, axes: Any, title: str, prefix: str, below: str) -> str:
    axes.text(0.01, 0.02, below, transform=axes.transAxes, fontsize=8.5, color=MUTED)
    style(axes)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.tick_params(axis="y", colors=MUTED, labelsize=8.5)
    return alone(drawn(plot, title, prefix))


def alone(svg: str) -> str:
    """A self-contained plot with its size, background and palette, dark if the reader's page is."""
    palette = (files("updater.gate") / "templates" / "palette.css").read_text()
    box: Sequence[str] = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    size = f'width="{box[0]}pt" height="{box[1]}pt"'
    ground = '<rect width="100%" height="100%" rx="6" fill="var(--card)"/>'
    text = "text { fill: var(--ink); font-family: system-ui, sans-serif; }"
    head, _, rest = svg.partition(">")
    return f"{head} {size}><style>{palette}\n{text}</style>{ground}{rest}"
