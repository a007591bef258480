"""The default's lead over each method and the untouched base, over all orders and bases that both were run in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.continual.intervals import interval
from benchmarks.continual.metrics import Floats
from benchmarks.continual.orders import ORDERS
from benchmarks.continual.outcomes import Course
from benchmarks.continual.protocol import STANDARDS
from benchmarks.continual.repeated import shared_draws, shared_places
from benchmarks.continual.report import BASE, Chains, standard_of
from benchmarks.continual.stream import SEEN_CLASSES

SHOWN = ("gm", "a_ka", "a_zs", "outside", "retrieval", "classes")


def leads(bases: Mapping[str, Chains]) -> dict[str, Any]:
    """By method: the default's score minus its own, for each figure; in GM also without the suite of the largest lead,
    and without the suites whose classes were trained on. A mean over bases of means over chains, resampled separately
    for each base: over items, and, under ``wide``, over suites and chains as well.
    """
    names = dict.fromkeys(name for _, chains in bases.values() for name in (*chains, BASE) if name not in STANDARDS)
    by_method = {name: lead for name in names if (lead := _lead(name, bases))}
    return dict(sorted(by_method.items(), key=lambda each: each[1]["gm"]["value"]))


def _lead(name: str, bases: Mapping[str, Chains]) -> dict[str, Any] | None:
    parts: dict[bool, dict[str, list[Floats]]] = {False: {}, True: {}}
    without, chains_run, orders = [], 0, set()
    for reference, chains in bases.values():
        ours, others = chains.get(standard_of(chains), []), chains.get(name, [])
        if name == BASE:
            others = [Course(course.unit, (reference.base,), ()) for course in ours]
        shared = shared_places(ours, others)
        if not shared:
            continue
        orders |= {order for order, _ in shared}
        chains_run += len(shared)
        for wide, found in parts.items():
            draws = shared_draws(ours, others, reference, wide)
            assert draws is not None
            largest = draws.largest("ours", "others")
            figures = {
                key: draws.differences(key, "ours", "others") for key in SHOWN if key == "gm" or draws.suites[key]
            }
            figures["gm_without_largest"] = draws.differences("gm", "ours", "others", [largest])
            figures["gm_without_seen"] = draws.differences("gm", "ours", "others", SEEN_CLASSES)
            for key, values in figures.items():
                found.setdefault(key, []).append(values)
        without.append(largest)
    if not chains_run:
        return None
    items, wide_too = (
        {key: interval(np.mean(arrays, axis=0)).plain() for key, arrays in found.items()} for found in parts.values()
    )
    return {
        **items,
        "wide": wide_too,
        "largest": sorted(set(without)),
        "chains": chains_run,
        "orders": [_order_name(number) for number in sorted(orders)],
    }


def _order_name(number: int) -> str:
    return ORDERS[number] if number < len(ORDERS) else f"random {number}"
