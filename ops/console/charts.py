"""The console's own plots, in the style of the gate's: inline SVG that takes its colours from the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ops.console.update_summaries import UpdateSummary
from updater.gate.plots import BAD, BEFORE, GOOD, INK, LINE, MUTED, OPEN, drawn, figure, style

COLOURS = {"passed": GOOD, "rejected": BAD, "inconclusive": OPEN}
WIDTH, HEIGHT = 7.2, 2.5
MOST = 16
"""Updates in a plot; older ones are in the table."""


def learning(summaries: Sequence[UpdateSummary]) -> str:
    """For each judged update the best gain and the worst loss, in points; empty without any."""
    judged = [summary for summary in reversed(summaries) if summary.verdict is not None][-MOST:]
    return _learning(
        tuple(
            (
                summary.update.family,
                summary.verdict.outcome if summary.verdict else "",
                summary.best_gain[1] if summary.best_gain else None,
                summary.worst_loss[1] if summary.worst_loss else None,
            )
            for summary in judged
        )
    )


def spending(summaries: Sequence[UpdateSummary]) -> str:
    """Compute of each update: training, and judging on top; empty without any."""
    spent = [summary for summary in reversed(summaries) if summary.train_gflops > 0][-MOST:]
    return _spending(
        tuple(
            (
                summary.update.family,
                summary.verdict.outcome if summary.verdict else "",
                summary.train_gflops,
                summary.gate_gflops,
            )
            for summary in spent
        )
    )


@lru_cache(32)
def _learning(rows: tuple[tuple[str, str, float | None, float | None], ...]) -> str:
    if not rows:
        return ""
    made = figure(HEIGHT, WIDTH)
    axes = made.add_axes((0.075, 0.2, 0.915, 0.74))
    for x, (_family, outcome, gain, loss) in enumerate(rows):
        colour = COLOURS.get(outcome, MUTED)
        low, high = min(0.0, loss or 0.0), max(0.0, gain or 0.0)
        axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=2.2, solid_capstyle="round")
        if gain is not None:
            axes.plot(x, 100 * gain, "^", color=colour, markersize=8)
        if loss is not None:
            axes.plot(x, 100 * loss, "v", color=colour, markersize=7)
    axes.axhline(0, color=INK, linewidth=0.9)
    _finish(axes, [f"{family.upper()}\n{outcome}" for family, outcome, _, _ in rows], "points")
    return drawn(made, "Best gain and worst loss of each update, in points", "l")


@lru_cache(32)
def _spending(rows: tuple[tuple[str, str, float, float], ...]) -> str:
    if not rows:
        return ""
    made = figure(HEIGHT, WIDTH)
    axes = made.add_axes((0.095, 0.2, 0.895, 0.74))
    for x, (_family, outcome, train, gate) in enumerate(rows):
        axes.bar(x, train, width=0.5, color=COLOURS.get(outcome, MUTED))
        axes.bar(x, gate, bottom=train, width=0.5, color=BEFORE)
    _finish(axes, [f"{family.upper()}\n{outcome or 'not judged'}" for family, outcome, _, _ in rows], "GFLOPs")
    axes.set_ylim(0, None)
    return drawn(made, "Compute of each update, in memory-adjusted GFLOPs", "s")


def _finish(axes: Any, labels: Sequence[str], unit: str) -> None:
    style(axes)
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.7, max(4.0, len(labels)) - 0.3)
    axes.set_ylabel(unit, color=MUTED, fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", colors=MUTED, labelsize=8)
