"""A method over several orders and seeds: its mean, its spread, each order, and the comparison with the default."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np

from benchmarks.continual.intervals import Draws, Interval, resampled
from benchmarks.continual.metrics import Trajectory, forgetting
from benchmarks.continual.outcomes import Course, Hits, Reference

FIGURES = ("a_ka", "a_zs", "gm")


def repeated(courses: Sequence[Course], reference: Reference, standard: Sequence[Course] = ()) -> dict[str, Any]:
    """Mean and spread over chains, points against zero-shot, and how much higher the GM is than ``standard``'s.

    ``by_order`` has the means over the seeds of each order, with the same comparison within it.
    """
    paths = [course.trajectory(reference) for course in courses]
    ends = {key: np.array([_end(path, key) for path in paths]) for key in FIGURES}
    orders = np.array([course.unit.order for course in courses])

    def figures(wanted: np.ndarray, suffix: str) -> dict[str, Any]:
        against = beside(list(compress(courses, wanted)), standard, reference)
        means = {f"{key}{suffix}": round(float(values[wanted].mean()), 2) for key, values in ends.items()}
        return {**means, "against_default": against.plain() if against else None}

    return {
        "chains": len(courses),
        **figures(np.ones(len(courses), bool), "_delta"),
        **{f"{key}_sd": round(float(values.std(ddof=1)), 2) for key, values in ends.items() if len(courses) > 1},
        "gm_lowest": round(float(min((100 * (path.gm - path.gm[0])).min() for path in paths)), 2),
        **_forgotten(courses),
        "by_order": {str(order): figures(orders == order, "") for order in sorted(set(orders.tolist()))},
    }


def beside(ours: Sequence[Course], others: Sequence[Course], reference: Reference) -> Interval | None:
    """Difference of the GM from others' over shared chains; None without any.

    Items are resampled, with the mean over the shared chains for each of them.
    """
    draws = shared_draws(ours, others, reference)
    return draws.difference("gm", "ours", "others") if draws else None


def shared_draws(
    ours: Sequence[Course], others: Sequence[Course], reference: Reference, wide: bool = False
) -> Draws | None:
    """Scores of ``ours`` and ``others``, means over the chains that both have; None without any. ``wide``: see
    :func:`benchmarks.continual.intervals.resampled`."""
    shared = sorted(shared_places(ours, others))
    if not shared:
        return None
    return resampled({"ours": _ends(ours, shared), "others": _ends(others, shared)}, reference, wide=wide)


def _forgotten(courses: Sequence[Course]) -> dict[str, float | None]:
    """Share of the gain that an update of another suite loses, over all chains; and without the suite with the largest
    gain, which a slope weighs by its square.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for course in courses:
        for suite, moments in zip(course.order, forgetting(course.path(course.order)), strict=True):
            sums[suite] = sums[suite] + moments
    largest = max(sums, key=lambda suite: sums[suite][1], default="")
    others = [moments for suite, moments in sums.items() if suite != largest]
    return {
        "forgotten_per_update": _slope(list(sums.values())),
        "forgotten_without_largest": _slope(others),
    }


def _slope(moments: Sequence[np.ndarray]) -> float | None:
    lost, squared = np.sum(moments, axis=0) if moments else (0.0, 0.0)
    return round(float(lost / squared), 3) if squared else None


def _end(path: Trajectory, key: str) -> float:
    values = getattr(path, key)
    return float(100 * (values[-1] - values[0]))


def shared_places(ours: Sequence[Course], others: Sequence[Course]) -> set[tuple[int, int]]:
    return {_place(course) for course in ours} & {_place(course) for course in others}


def _place(course: Course) -> tuple[int, int]:
    return course.unit.order, course.unit.seed


def _ends(courses: Sequence[Course], wanted: Sequence[tuple[int, int]]) -> list[Hits]:
    by_place = {_place(course): course.hits[-1] for course in courses}
    return [by_place[place] for place in wanted]
