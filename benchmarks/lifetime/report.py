"""The results of one rule set's streams as a row of figures, and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.gate.counting import share
from benchmarks.gate.plot import INK, LINE, MUTED, PAPER
from benchmarks.lifetime.stream import GAIN3, TRIGGERS, Course, Ended

FigureRow = dict[str, Any]
COLOURS = ("#17704a", "#1f5fa8", "#d98032", "#b23232", "#7a4fa3", "#9a8a10")


def row_of(name: str, courses: Sequence[Course]) -> FigureRow:
    """Figures over all streams of a rule set."""
    lessons = [ended for course in courses for ended in course.lessons]
    headline = [ended for ended in lessons if ended.lesson.gain == GAIN3]
    retained, most = (sum(sum(side.values()) for side in sides) for sides in _sides(courses))
    return {
        "rules": name,
        "streams": len(courses),
        "lessons": len(lessons),
        "gain3": _released(headline),
        "by_gain": {f"{100 * gain:g}": _released([e for e in lessons if e.lesson.gain == gain])
                    for gain in sorted({e.lesson.gain for e in lessons})},
        "within": [share(sum(e.released and e.triggers <= t for e in headline), len(headline))["rate"]
                   for t in range(1, TRIGGERS + 1)],
        "triggers_gain3": _mean([e.triggers for e in headline if e.released]),
        "looks": sum(ended.looks for ended in lessons),
        "learned_points": round(100 * most / max(len(courses), 1), 1),
        "kept": round(retained / most, 3) if most > 0 else None,
        "harmful": sum(course.harmful for course in courses),
        "harmful_released": sum(course.harmful_released for course in courses),
        "alpha_mean": _mean([spent for course in courses for spent in course.alpha]),
        "alpha_most": max((spent for course in courses for spent in course.alpha), default=0.0),
    }  # fmt: skip


def _sides(courses: Sequence[Course]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [{name: c.end[name] for name in c.best} for c in courses], [c.best for c in courses]


def _released(ended: Sequence[Ended]) -> Mapping[str, Any]:
    return share(sum(each.released for each in ended), len(ended))


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def draw(rows: Sequence[FigureRow], path: Path) -> Path:
    """Plot updates with a gain of 3 points that were released, by trigger, a line for each rule set; writes a PNG."""
    figure = Figure(figsize=(7.2, 3.9), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = list(range(1, TRIGGERS + 1))
    for row, colour in zip(rows, COLOURS, strict=False):
        axes.plot(places, [100 * (value or 0.0) for value in row["within"]], "o-", color=colour, linewidth=2,
                  markersize=4, label=row["rules"])  # fmt: skip
    axes.set_ylim(0, 101)
    axes.set_xticks(places)
    axes.set_xlabel("triggers (256 samples to train on, 45 held out)", color=MUTED)
    axes.set_ylabel("released, %", color=MUTED)
    axes.set_title("Updates with a true gain of 3 points", color=INK, fontsize=11, loc="left")
    axes.grid(color=LINE, linewidth=0.7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=MUTED, labelsize=8.5)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
