"""Running quantiles of agreement, by source and domain."""

from __future__ import annotations

import json

import numpy as np
import pytest

from updater.data.agreement import BINS, ENOUGH, MOST, OTHERS, WINDOW, Agreements

RANDOM = np.random.default_rng(0)


def normal(mean: float, deviation: float = 0.05, count: int = 4000) -> list[float]:
    return RANDOM.normal(mean, deviation, count).tolist()


def filled(**values: list[float]) -> Agreements:
    table = Agreements()
    for source, each in values.items():
        table.add([(source, "d")] * len(each), each)
    return table


def fence(table: Agreements, source: str, ranges: float = 1.5, domain: str = "d") -> float:
    return table.fences([(source, domain)], ranges)[source, domain]


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.05), (0.0, 0.1), (-0.4, 0.02), (0.95, 0.01)])
def test_a_fence_is_tukeys(mean: float, deviation: float) -> None:
    values = normal(mean, deviation)
    low, high = np.quantile(values, [0.25, 0.75])
    for ranges in (0.5, 1.5, 3.0):
        assert fence(filled(a=values), "a", ranges) == pytest.approx(low - ranges * (high - low), abs=2 / BINS)
    assert 0.001 < np.mean(np.array(values) < fence(filled(a=values), "a")) < 0.01


def test_a_source_that_errs_throughout_is_compared_with_the_others_of_its_domain() -> None:
    table = filled(a=normal(0.3), b=normal(0.3), bad=normal(0.0))
    assert fence(table, "bad") > 0.1 > fence(filled(bad=normal(0.0)), "bad")
    assert fence(table, "a") > fence(filled(a=normal(0.3)), "a") - 0.01
    assert fence(table, "new") == pytest.approx(fence(filled(a=normal(0.15, 0.16)), "new"), abs=0.3)
    assert fence(table, "bad", domain="elsewhere") == -1.0


def test_feedback_is_compared_with_all_else_while_its_domain_is_new() -> None:
    table = filled(a=normal(0.3))
    table.add([("feedback:ana", "feedback")] * 3, [0.0] * 3)
    assert fence(table, "feedback:ana", domain="feedback") > 0.1
    assert fence(table, "vendor", domain="feedback") == -1.0


def test_too_few_values_have_no_fence_and_odd_ones_no_error() -> None:
    assert fence(filled(a=normal(0.3, count=ENOUGH - 1)), "a") == -1.0
    assert fence(filled(a=[0.25] * ENOUGH), "a") == pytest.approx(0.25, abs=4 / BINS)
    assert fence(filled(a=[-1.0, 1.0, -1.5, 1.5] * ENOUGH), "a") == -1.0  # nothing is held
    assert Agreements().fences([("a", "d")], 1.5) == {("a", "d"): -1.0}


def test_memory_is_bounded_and_old_values_count_less() -> None:
    table = filled(a=normal(0.3, count=2 * WINDOW))
    table.add([("a", "d")] * WINDOW * 2, normal(0.6, count=2 * WINDOW))
    assert table.counts["a", "d"].sum() < WINDOW
    assert fence(table, "a") > 0.3
    table.add([(f"source {number}", "d") for number in range(2 * MOST)], [0.3] * (2 * MOST))
    assert len(table.counts) == MOST + 1 and table.counts[OTHERS, OTHERS].sum() == MOST + 1
    assert len(json.dumps(table.to_json())) < 200_000


def test_a_table_is_the_same_after_a_restart() -> None:
    table = filled(a=normal(0.3), b=[-1.0, 0.999])
    again = Agreements.parse(json.loads(json.dumps(table.to_json())))
    assert again.counts.keys() == table.counts.keys()
    assert fence(again, "a") == pytest.approx(fence(table, "a"))
