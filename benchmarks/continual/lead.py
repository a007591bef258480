"""The default's lead over each method and the untouched base, over all orders and bases that both were run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.continual.intervals import Draws, interval
from benchmarks.continual.metrics import Floats
from benchmarks.continual.orders import ORDERS
from benchmarks.continual.outcomes import Course
from benchmarks.continual.protocol import STANDARDS
from benchmarks.continual.repeated import shared_draws, shared_places
from benchmarks.continual.report import BASE, Chains, standard_of
from benchmarks.continual.stream import SEEN_CLASSES

SHOWN = ("gm", "a_ka", "a_zs", "outside", "retrieval", "classes", "unseen")


def leads(bases: Mapping[str, Chains]) -> dict[str, Any]:
    """By method: the default's score minus its own, for each figure; in GM also without the suite of the largest lead,
    and without the suites whose classes were trained on. A mean over bases of means over chains, resampled separately
    for each base: over items, and, under ``wide``, over suites and chains as well.
    """
    names = dict.fromkeys(name for _, chains in bases.values() for name in (*chains, BASE) if name not in STANDARDS)
    by_method = {name: lead for name in names if (lead := _lead(name, bases))}
    return dict(sorted(by_method.items(), key=lambda each: each[1]["gm"]["value"]))


def _lead(name: str, bases: Mapping[str, Chains]) -> dict[str, Any] | None:
    pairs = [(*_courses(name, chains), reference) for reference, chains in bases.values()]
    draws = [drawn for pair in pairs if (drawn := shared_draws(*pair))]
    if not draws:
        return None
    places = [place for ours, others, _ in pairs for place in shared_places(ours, others)]
    return {
        **_intervals(draws),
        "wide": _intervals([drawn for pair in pairs if (drawn := shared_draws(*pair, wide=True))]),
        "largest": sorted({each.largest("ours", "others") for each in draws}),
        "chains": len(places),
        "orders": [_order_name(number) for number in sorted({order for order, _ in places})],
    }


def _courses(name: str, chains: Mapping[str, list[Course]]) -> tuple[Sequence[Course], Sequence[Course]]:
    """Chains of the default and of a method; those of the base are the default's without its updates."""
    ours = chains.get(standard_of(chains), [])
    if name == BASE:
        return ours, [Course(course.unit, course.hits[:1], ()) for course in ours]
    return ours, chains.get(name, [])


def _intervals(draws: Sequence[Draws]) -> dict[str, Any]:
    """By figure, the mean over bases."""
    parts: dict[str, list[Floats]] = {}
    for each in draws:
        for key in SHOWN:
            if key == "gm" or each.suites[key]:
                parts.setdefault(key, []).append(each.differences(key, "ours", "others"))
        left_out = {"largest": [each.largest("ours", "others")], "seen": SEEN_CLASSES}
        for what, suites in left_out.items():
            parts.setdefault(f"gm_without_{what}", []).append(each.differences("gm", "ours", "others", suites))
    return {key: interval(np.mean(arrays, axis=0)).plain() for key, arrays in parts.items()}


def _order_name(number: int) -> str:
    return ORDERS[number] if number < len(ORDERS) else f"random {number}"
