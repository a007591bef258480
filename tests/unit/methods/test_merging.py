"""Merge rules against loops over plain floats, and the search for a rule's weight."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from core.errors import ConfigError
from serving.engines.adapters import adapter_name
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.unit.updater.builders import recipe, run
from updater.adapters import Dense, LowRank, WeightDelta, compress, read_delta
from updater.methods.merging import RULES, merged, remembered, search
from updater.recipes import Merge, Recipe
from updater.training.checkpoint import CarryOver
from updater.training.workers import Stopped

OUT, INNER = 6, 5


def factor(seed: int, rank: int = 2) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, INNER, generator=made, dtype=torch.float64),
        torch.randn(OUT, rank, generator=made, dtype=torch.float64),
    )


def values(delta: WeightDelta, name: str = "layer") -> list[float]:
    part = delta[name]
    dense = part.dense() if isinstance(part, LowRank) else part.value
    return [float(value) for value in dense.flatten()]


def length(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


OLD: WeightDelta = {"layer": factor(1), "bias": Dense(torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64))}
NEW: WeightDelta = {"layer": factor(2), "bias": Dense(torch.tensor([-1.5, -2.0, 1.0, 4.0], dtype=torch.float64))}
START: WeightDelta = {"layer": factor(3), "bias": Dense(torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64))}


@pytest.mark.parametrize("name", ["layer", "bias"])
def test_slerp_equals_the_plain_formula_and_of_one_direction_or_of_one_alone_is_the_straight_line(name: str) -> None:
    old, new = values(OLD, name), values(NEW, name)
    angle = math.acos(sum(a * b for a, b in zip(old, new, strict=True)) / length(old) / length(new))
    first, second = math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)
    expected = [first * a + second * b for a, b in zip(old, new, strict=True)]
    assert values(merged(Merge(rule="slerp", weight=0.3), OLD, NEW, {}), name) == pytest.approx(expected)
    twice = {"layer": LowRank(2 * factor(1).a, factor(1).b)}
    same_direction = merged(Merge(rule="slerp", weight=0.5), {"layer": factor(1)}, twice, {})
    assert values(same_direction) == pytest.approx([1.5 * value for value in values(OLD)])
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
    """The merged adapter is served in between with its own rank: neither is in the next merge."""
    rule = Merge(rule="ties", weight=0.7, options={"keep": keep})
    served: WeightDelta = {}
    memory: dict[str, torch.Tensor] = {}
    third: WeightDelta = {"layer": factor(3), "bias": Dense(torch.tensor([0.7, -3.0, -0.2, 0.4], dtype=torch.float64))}
    for learned in (OLD, NEW, third):
        memory = remembered(rule, served, learned, {}, memory)
        after = merged(rule, served, learned, {}, memory)
        served = {"layer": compress(after["layer"], 1), "bias": after["bias"]}
    vectors = [_trimmed(values(each, name), keep) for each in (OLD, NEW, third)]
    assert values(after, name) == pytest.approx(_plain_ties(vectors, 0.7), rel=1e-5, abs=1e-6)


def test_the_memory_of_a_merge_goes_into_the_next_update(base: ClipBase, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", ["layer", "bias"])
@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        (Merge(rule="task_arithmetic", weight=0.4), (1.0, 0.4, -0.4)),
        (Merge(weight=0.3), (0.7, 0.3, 0.0)),
        (Merge(weight=0.3, options={"towards": "base"}), (0.0, 0.3, 0.0)),
    ],
)
def test_a_linear_rule_is_the_weighted_sum(rule: Merge, shares: tuple[float, float, float], name: str) -> None:
    rows = zip(*(values(delta, name) for delta in (OLD, NEW, START)), strict=True)
    expected = [sum(share * value for share, value in zip(shares, row, strict=True)) for row in rows]
    assert values(merged(rule, OLD, NEW, START), name) == pytest.approx(expected)


@pytest.mark.parametrize("rule", [name for name in RULES.names() if name != "none"])
def test_a_rule_without_anything_served_is_a_share_of_what_was_trained(rule: str) -> None:
    found = values(merged(Merge(rule=rule, weight=0.5), {}, {"layer": factor(2)}, {}))
    assert all(value == 0 or value == pytest.approx(0.5 * new) for value, new in zip(found, values(NEW), strict=True))
    assert any(found)


def test_an_unknown_rule_or_option_is_refused() -> None:
    refused = {
        "mean": {}, "slerp": {"keep": 1}, "linear": {"towards": "x"}, "ties": {"keep": 0.0},
    }  # fmt: skip
    for rule, options in [*refused.items(), ("ties", {"keep": 2})]:
        with pytest.raises(ConfigError, match=next(iter(options), rule)):
            merged(Merge(rule=rule, options=options), OLD, NEW, {})


def test_a_zero_shot_merge_trains_from_the_base_and_joins_what_is_served(base: ClipBase, tmp_path: Path) -> None:
    plan = recipe("zero-shot-merge", max_steps=2)
    first = run(base, tmp_path / "first", recipe=plan)
    second = run(base, tmp_path / "second", recipe=plan, incumbent=first.directory, seed=5)
    alone = recipe("zero-shot-merge", max_steps=2, merge={"rule": "none"})
    fresh = run(base, tmp_path / "fresh", recipe=alone, seed=5)
    served, trained, found = (read_delta(made.directory, base) for made in (first, fresh, second))
    expected = merged(plan.merge, served, trained, {})
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert isinstance(part, LowRank)
        assert values(found, name) == pytest.approx(values({name: compress(part, plan.rank)}, name), abs=1e-6)


WEIGHTS = (0.2, 0.6, 1.0)


class Picky:
    """Prefers the ``wanted``-th adapter that it scores, and records the length of each one's ΔW."""

    passes = 7

    def __init__(self, base: ClipBase, wanted: int) -> None:
        self.model = base.build_model()
        self.wanted = wanted
        self.asked: list[float] = []

    def __call__(self, directory: Path) -> float:
        plain = dict(self.model.named_parameters())
        changed = effective_weights(directory, self.model)
        self.asked.append(float(torch.stack([(w - plain[n]).norm() for n, w in changed.items()]).norm()))
        return 1.0 if len(self.asked) == self.wanted else 0.5


def plan(**merge: object) -> Recipe:
    return recipe("paint", max_steps=2, merge={"rule": "linear", "weight": 0.5, **merge})


def test_each_weight_is_scored_once_and_the_best_one_is_served(base: ClipBase, tmp_path: Path) -> None:
    picky, searching = Picky(base, wanted=2), plan(search=WEIGHTS)
    found = run(base, tmp_path / "searched", recipe=searching, scored=picky)
    fixed = run(base, tmp_path / "fixed", recipe=plan(weight=0.6))
    assert found.adapter == fixed.adapter == adapter_name(found.directory)
    assert picky.asked == pytest.approx([w / 0.6 * picky.asked[1] for w in WEIGHTS], rel=1e-3)
    assert found.cost["merge_weight"] == 0.6
    assert found.cost["search_scores"] == {"0.2": 0.5, "0.6": 1.0, "1": 0.5}
    assert found.cost["search_gflops"] == pytest.approx(3 * 7 * found.cost["sample_gflops"])
    assert "search_gflops" not in fixed.cost
    assert [path.name for path in (tmp_path / "searched" / "adapters").iterdir()] == [found.adapter]
    stopped = Picky(base, wanted=2)
    with pytest.raises(Stopped):
        run(base, tmp_path / "two", recipe=searching, scored=stopped, stop=lambda: len(stopped.asked) == 2)
    assert not list((tmp_path / "two" / "adapters").iterdir())
    again = run(base, tmp_path / "two", recipe=searching, scored=Picky(base, wanted=2))
    assert (again.adapter, again.steps) == (found.adapter, 2), "it begins again and ends in the same adapter"
    with pytest.raises(ConfigError, match=r"merge\.search"):
        run(base, tmp_path / "unscored", recipe=searching, scored=None)
    assert not (tmp_path / "unscored" / "adapters").exists()


@pytest.mark.parametrize(("passes", "taken", "tried"), [(1, 0.4, [0.4, 0.2, 0.9]), (0, 0.7, [])])
def test_among_equals_the_first_one_is_taken_and_without_items_the_recipes(
    tmp_path: Path, passes: int, taken: float, tried: list[float]
) -> None:
    written: list[float] = []
    scored = Mock(return_value=0.3, passes=passes)

    def write(merge: Merge, place: Path) -> str:
        written.append(merge.weight)
        return place.name

    found = search(Merge(weight=0.7, search=(0.4, 0.2, 0.9)), scored, write, tmp_path)
    assert (found.merge.weight, written) == (taken, tried)
