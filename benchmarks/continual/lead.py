"""The default's lead over each method and the untouched base, over all orders and bases that both were run in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.continual.intervals import interval
from benchmarks.continual.orders import ORDERS
from benchmarks.continual.outcomes import Course
from benchmarks.continual.protocol import STANDARDS
from benchmarks.continual.repeated import shared_draws, shared_places
from benchmarks.continual.report import BASE, Chains, standard_of

SHOWN = ("gm", "a_ka", "a_zs", "outside", "retrieval", "classes")


def leads(bases: Mapping[str, Chains]) -> dict[str, Any]:
    """By method: the default's score minus its own, for each figure, and in GM without the suite of the largest lead. A
    mean over bases of means over chains; items are resampled separately for each base.
    """
    names = dict.fromkeys(name for _, chains in bases.values() for name in (*chains, BASE) if name not in STANDARDS)
    by_method = {name: lead for name in names if (lead := _lead(name, bases))}
    return dict(sorted(by_method.items(), key=lambda each: each[1]["gm"]["value"]))


def _lead(name: str, bases: Mapping[str, Chains]) -> dict[str, Any] | None:
    parts: dict[str, list[Any]] = {}
    without, chains_run, orders = [], 0, set()
    for reference, chains in bases.values():
        ours, others = chains.get(standard_of(chains), []), chains.get(name, [])
        if name == BASE:
            others = [Course(course.unit, (reference.base,), ()) for course in ours]
        draws = shared_draws(ours, others, reference)
        if draws is None:
            continue
        shared = shared_places(ours, others)
        orders |= {order for order, _ in shared}
        chains_run += len(shared)
        for key in SHOWN:
            if key == "gm" or draws.suites[key]:
                parts.setdefault(key, []).append(draws.differences(key, "ours", "others"))
        largest = draws.largest("ours", "others")
        without.append(largest)
        parts.setdefault("gm_without_largest", []).append(draws.differences("gm", "ours", "others", largest))
    if not parts:
        return None
    return {
        **{key: interval(np.mean(arrays, axis=0)).plain() for key, arrays in parts.items()},
        "largest": sorted(set(without)),
        "chains": chains_run,
        "orders": [_order_name(number) for number in sorted(orders)],
    }


def _order_name(number: int) -> str:
    return ORDERS[number] if number < len(ORDERS) else f"random {number}"
