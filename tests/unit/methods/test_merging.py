"""Merge rules against loops over plain floats, and what each of them is for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import recipe, run
from updater.adapters import Dense, LowRank, WeightDelta, compress, read_delta
from updater.methods.merging import RULES, merged, remembered
from updater.recipes import Merge
from updater.training.checkpoint import CarryOver

OUT, INNER = 6, 5


def factor(seed: int, rank: int = 2) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, INNER, generator=made, dtype=torch.float64),
        torch.randn(OUT, rank, generator=made, dtype=torch.float64),
    )


def values(delta: WeightDelta, name: str = "layer") -> list[float]:
    """ΔW as one row of floats."""
    part = delta[name]
    dense = part.dense() if isinstance(part, LowRank) else part.value
    return [float(value) for value in dense.flatten()]


def length(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


OLD: WeightDelta = {"layer": factor(1), "bias": Dense(torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64))}
NEW: WeightDelta = {"layer": factor(2), "bias": Dense(torch.tensor([-1.5, -2.0, 1.0, 4.0], dtype=torch.float64))}
START: WeightDelta = {"layer": factor(3), "bias": Dense(torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64))}


@pytest.mark.parametrize("name", ["layer", "bias"])
def test_slerp_equals_the_plain_formula(name: str) -> None:
    old, new = values(OLD, name), values(NEW, name)
    angle = math.acos(sum(a * b for a, b in zip(old, new, strict=True)) / length(old) / length(new))
    first, second = math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)
    expected = [first * a + second * b for a, b in zip(old, new, strict=True)]
    assert values(merged(Merge(rule="slerp", weight=0.3), OLD, NEW, {}), name) == pytest.approx(expected)


def test_slerp_of_one_direction_or_of_one_alone_is_the_straight_line() -> None:
    twice = {"layer": LowRank(2 * factor(1).a, factor(1).b)}
    assert values(merged(Merge(rule="slerp", weight=0.5), {"layer": factor(1)}, twice, {})) == pytest.approx(
        [1.5 * value for value in values(OLD)]
    )
    alone = merged(Merge(rule="slerp", weight=0.3), {"old": factor(1)}, {"new": factor(2)}, {})
    assert values(alone, "old") == pytest.approx([0.7 * value for value in values(OLD)])
    assert values(alone, "new") == pytest.approx([0.3 * value for value in values(NEW)])


def _trimmed(row: list[float], keep: float) -> list[float]:
    largest = sorted(range(len(row)), key=lambda i: -abs(row[i]))[: int(keep * len(row))]
    return [value if i in largest else 0.0 for i, value in enumerate(row)]


def _plain_ties(vectors: list[list[float]], weight: float) -> list[float]:
    elected = []
    for column in zip(*vectors, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        elected.append(weight * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return elected


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["layer", "bias"])
def test_ties_of_updates_one_after_another_is_that_of_all_at_once(name: str, keep: float) -> None:
    """What is served in between is merged, and written as a rank of its own: neither is in the next merge."""
    rule = Merge(rule="ties", weight=0.7, options={"keep": keep})
    served: WeightDelta = {}
    memory: dict[str, torch.Tensor] = {}
    third: WeightDelta = {"layer": factor(3), "bias": Dense(torch.tensor([0.7, -3.0, -0.2, 0.4], dtype=torch.float64))}
    for learned in (OLD, NEW, third):
        memory = remembered(rule, served, learned, {}, memory)
        after = merged(rule, served, learned, {}, memory)
        served = {"layer": compress(after["layer"], 1), "bias": after["bias"]}  # type: ignore[arg-type]
    vectors = [_trimmed(values(each, name), keep) for each in (OLD, NEW, third)]
    assert values(after, name) == pytest.approx(_plain_ties(vectors, 0.7), rel=1e-5, abs=1e-6)


def test_an_update_takes_nothing_from_weights_that_it_leaves_alone() -> None:
    """Each merge used to trim what was served as well: a fifth was left of a fifth."""
    rule = Merge(rule="ties", weight=1.0, options={"keep": 0.5})
    known = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    new = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    served: WeightDelta = {"bias": Dense(known)}
    assert values(merged(rule, served, {"bias": Dense(new)}, {}), "bias") == (known + new).tolist()


def test_the_memory_of_a_merge_goes_into_the_next_update(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    plan = recipe("ties-merge", text={"locked": True}, max_steps=2)
    first = run(base, tmp_path / "first", recipe=plan)
    assert first.carry_over is not None
    known = CarryOver.read(first.carry_over).merge
    assert known and all(int(count.max()) == 1 for key, count in known.items() if key.endswith("/count"))
    again = {"recipe": plan, "incumbent": first.directory, "seed": 5}
    second = run(base, tmp_path / "second", carry_over=first.carry_over, **again)
    assert second.carry_over is not None
    later = CarryOver.read(second.carry_over).merge
    assert max(int(count.max()) for key, count in later.items() if key.endswith("/count")) == 2
    assert run(base, tmp_path / "without", **again).adapter != second.adapter


def test_task_arithmetic_adds_what_was_learned_since_the_start() -> None:
    found = merged(Merge(rule="task_arithmetic", weight=0.4), OLD, NEW, START)
    for name in ("layer", "bias"):
        rows = zip(values(OLD, name), values(NEW, name), values(START, name), strict=True)
        assert values(found, name) == pytest.approx([old + 0.4 * (new - start) for old, new, start in rows])
    untouched = merged(Merge(rule="task_arithmetic", weight=0.4), OLD, START, START)
    assert values(untouched) == pytest.approx(values(OLD))


def test_the_other_end_of_the_line_is_what_is_served_or_the_base() -> None:
    served = merged(Merge(weight=0.3), OLD, NEW, START)
    base = merged(Merge(weight=0.3, options={"towards": "base"}), OLD, NEW, START)
    rows = zip(values(OLD), values(NEW), strict=True)
    assert values(served) == pytest.approx([0.7 * old + 0.3 * new for old, new in rows])
    assert values(base) == pytest.approx([0.3 * new for new in values(NEW)])


@pytest.mark.parametrize("rule", [name for name in RULES.names() if name != "none"])
def test_a_rule_without_anything_served_is_a_share_of_what_was_trained(rule: str) -> None:
    found = values(merged(Merge(rule=rule, weight=0.5), {}, {"layer": factor(2)}, {}))
    assert all(value == 0 or value == pytest.approx(0.5 * new) for value, new in zip(found, values(NEW), strict=True))
    assert any(found)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("mean", {}),
        ("slerp", {"keep": 1}),
        ("ties", {"keep": 0.0}),
        ("ties", {"keep": 2}),
        ("linear", {"towards": "x"}),
    ],
)
def test_an_unknown_rule_or_option_is_refused(rule: str, options: dict[str, float | int | str | bool]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options), rule)):
        merged(Merge(rule=rule, options=options), OLD, NEW, {})


def test_a_zero_shot_merge_trains_from_the_base_and_joins_what_is_served(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "home")
    plan = recipe("zero-shot-merge", max_steps=3)
    first = run(base, tmp_path / "first", recipe=plan)
    second = run(base, tmp_path / "second", recipe=plan, incumbent=first.directory, seed=5)
    alone = recipe("zero-shot-merge", max_steps=3, merge={"rule": "none"})
    fresh = run(base, tmp_path / "fresh", recipe=alone, seed=5)
    served, trained, found = (read_delta(made.directory, base) for made in (first, fresh, second))
    expected = merged(plan.merge, served, trained, {})
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert isinstance(part, LowRank)
        assert values(found, name) == pytest.approx(values({name: compress(part, plan.rank)}, name), abs=1e-6)
