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
from benchmarks.lifetime.stream import GAIN3, TRIGGERS, Course

FEWEST_STREAMS, RESAMPLES = 5, 10_000
"""With fewer streams an interval takes lessons as independent, and is too short if streams differ."""
FigureRow = dict[str, Any]
COLOURS = ("#17704a", "#1f5fa8", "#d98032", "#b23232", "#7a4fa3", "#9a8a10")


def row_of(name: str, courses: Sequence[Course]) -> FigureRow:
    """Figures over all streams of a rule set."""
    lessons = [ended for course in courses for ended in course.lessons]
    headline = [ended for ended in lessons if ended.lesson.gain == GAIN3]
    gains = sorted({ended.lesson.gain for ended in lessons})
    retained, most = (sum(sum(side.values()) for side in sides) for sides in _sides(courses))
    return {
        "rules": name,
        "streams": len(courses),
        "lessons": len(lessons),
        "gain3": _released(courses, GAIN3),
        "by_gain": {f"{100 * gain:g}": _released(courses, gain) for gain in gains},
        "within": [share(sum(e.released and e.triggers <= t for e in headline), len(headline))["rate"]
                   for t in range(1, TRIGGERS + 1)],
        "triggers_gain3": _mean([e.triggers for e in headline if e.released]),
        "looks": sum(ended.looks for ended in lessons),
        "learned_points": round(100 * most / max(len(courses), 1), 1),
        "kept": round(retained / most, 3) if most > 0 else None,
        "harmful": sum(course.harmful for course in courses),
        "harmful_released": sum(course.harmful_released for course in courses),
        **{key: sum(getattr(course, key) for course in courses)
           for key in ("audits", "audits_failed", "audits_failed_wrongly")},
        "alpha_mean": _mean([spent for course in courses for spent in course.alpha]),
        "alpha_most": max((spent for course in courses for spent in course.alpha), default=0.0),
    }  # fmt: skip


def _sides(courses: Sequence[Course]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [{name: c.end[name] for name in c.best} for c in courses], [c.best for c in courses]


def _released(courses: Sequence[Course], gain: float) -> Mapping[str, Any]:
    """Released lessons with a gain. Lessons of a stream are not independent: streams are drawn again for the interval
    (percentiles) where there are enough of them."""
    streams = [[ended.released for ended in course.lessons if ended.lesson.gain == gain] for course in courses]
    counts = np.array([[sum(stream), len(stream)] for stream in streams if stream])
    if not len(counts):
        return share(0, 0)
    counted = {**share(*counts.sum(axis=0).tolist()), "by": "lesson"}
    if len(counts) < FEWEST_STREAMS:
        return counted
    drawn = counts[np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return {**counted, "low": float(low), "high": float(high), "by": "stream"}


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
    axes.set_xlabel("triggers (256 samples to train on, 64 held out)", color=MUTED)
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
