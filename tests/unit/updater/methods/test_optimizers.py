from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import recipe, run
from updater.adapters import LowRank, read_delta
from updater.methods.optimizers import Average, learning_rate, meta_factor
from updater.recipes import Schedule
from updater.step.learner import AnyLearner, Learner

INFINITE = Schedule(peak=1.0, constant=0.1, final=0.01, warmup_steps=10, cooldown_steps=20, anneal_steps=10)


def rates(schedule: Schedule, steps: int, first: bool = True, update: int = 0) -> list[float]:
    return [learning_rate(schedule, step, steps, first, update) for step in range(steps)]


@pytest.mark.parametrize("kind", ["infinite", "rsqrt"])
def test_the_rate_before_the_anneal_does_not_depend_on_the_number_of_steps(kind: str) -> None:
    schedule = INFINITE.model_copy(update={"kind": kind})
    assert rates(schedule, 60)[:50] == rates(schedule, 5000)[:50]


@pytest.mark.parametrize("kind", ["infinite", "rsqrt"])
@pytest.mark.parametrize("first", [True, False])
def test_a_short_update_warms_up_for_a_quarter_of_its_steps_and_ends_at_the_final_rate(kind: str, first: bool) -> None:
    short = INFINITE.model_copy(update={"kind": kind, "anneal_steps": 0})
    found = rates(short, 8, first)
    assert found[0] == pytest.approx(found[1] / 2)
    assert found[1:] == pytest.approx([found[1]] * 7) and rates(short, 1, first) == pytest.approx([found[1]])
    ends = rates(INFINITE.model_copy(update={"kind": kind}), 3, first)  # shorter than its anneal
    assert ends[-1] == pytest.approx(0.01) and min(ends) > 0


def test_cosine_equals_its_formula() -> None:
    found = rates(Schedule(kind="cosine", peak=1.0, final=0.1, warmup_steps=5), 25, first=False)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * i / 20)) for i in range(1, 21)])


def test_infinite_equals_its_formula_at_every_step_and_later_updates_skip_the_peak() -> None:
    def plain(step: int) -> float:
        if step < 10:
            return (step + 1) / 10
        if step < 30:
            return 0.1 + (1.0 - 0.1) * (1 + math.cos(math.pi * (step - 9) / 20)) / 2
        return 0.1 if step < 90 else 0.1 * (0.01 / 0.1) ** ((step - 89) / 10)

    first, later = rates(INFINITE, 100), rates(INFINITE, 100, first=False)
    assert first == pytest.approx([plain(step) for step in range(100)])
    assert later[:30] == pytest.approx([0.1 * (i + 1) / 10 for i in range(10)] + [0.1] * 20)
    assert later[30:] == pytest.approx(first[30:])


def test_rsqrt_equals_its_formula_at_every_step() -> None:
    def plain(step: int) -> float:
        return 2.0 * min((step + 1) / 4, math.sqrt(4 / (step + 1)))

    found = rates(Schedule(kind="rsqrt", peak=2.0, final=0.01, warmup_steps=4, anneal_steps=10), 50)
    assert found[:40] == pytest.approx([plain(step) for step in range(40)])
    assert found[40:] == pytest.approx([plain(40) * (0.01 / plain(40)) ** (i / 10) for i in range(1, 11)])


@pytest.mark.parametrize("kind", ["infinite", "rsqrt", "cosine"])
def test_the_meta_schedule_lowers_every_rate_from_update_to_update_and_never_raises_one(kind: str) -> None:
    plain = INFINITE.model_copy(update={"kind": kind})
    schedule = plain.model_copy(update={"updates": "rsqrt"})
    for update in (0, 1, 2, 50):
        factor = math.sqrt((update + 1) * 10 / (update * 100 + 10))
        assert rates(schedule, 100, True, update) == pytest.approx([factor * rate for rate in rates(plain, 100)])
    falling = [meta_factor(schedule, update, 100) for update in range(200)]
    assert falling[0] == 1.0 and falling[-1] > math.sqrt(10 / 100)
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert [meta_factor(schedule, update, 5) for update in range(3)] == [1.0, 1.0, 1.0]


def _walk(every: int, values: list[float]) -> float:
    """The parameters handed over after a walk from 0 through these values."""
    parameters = {"w": nn.Parameter(torch.zeros(2))}
    average = Average(parameters, every)
    for value in values:
        parameters["w"].data.fill_(value)
        average.stepped(parameters)
    resumed = Average(parameters, every)
    resumed.load_state(average.state())
    for each in (average, resumed):
        parameters["w"].data.fill_(values[-1])
        each.apply(parameters)
    return float(parameters["w"][0].detach())


@pytest.mark.parametrize(
    ("every", "values", "mean"),
    [
        (1, [1.0, 2.0, 6.0], 9 / 4),
        (2, [1.0, 2.0, 3.0, 4.0], 6 / 3),
        (2, [1.0, 2.0, 3.0], 5 / 3),
        (100, [1.0, 2.0, 3.0], 3 / 2),
    ],
)
def test_the_mean_is_of_the_start_every_nth_step_and_the_last(every: int, values: list[float], mean: float) -> None:
    assert _walk(every, values) == pytest.approx(mean)


def test_an_update_hands_over_its_mean(base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[dict[str, Tensor]] = []
    original = Learner.optimizer_step

    def copy(learner: AnyLearner) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}

    def update(self: AnyLearner, *given: Any) -> None:
        if not passed:
            passed.append(copy(self))
        original(self, *given)
        passed.append(copy(self))

    monkeypatch.setattr(Learner, "optimizer_step", update)
    plan = recipe("zscl", average_every=2, max_steps=5)
    written = read_delta(run(base, tmp_path, recipe=plan).directory, base)
    assert len(passed) == 6
    handed = {name: torch.stack([passed[step][name] for step in (0, 2, 4, 5)]).mean(dim=0) for name in passed[0]}
    layers = [name for name in written if name.endswith("c_fc")]
    assert layers
    for name in layers:
        factors = handed[f"{name}.lora_B"].double() @ handed[f"{name}.lora_A"].double()
        part = written[name]
        assert isinstance(part, LowRank) and torch.allclose(part.dense(), plan.alpha / plan.rank * factors, atol=1e-7)
