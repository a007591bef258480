from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

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


@pytest.mark.parametrize("kind", ["infinite", "rsqrt"])
def test_the_rate_before_the_anneal_does_not_depend_on_the_number_of_steps(kind: str) -> None:
    schedule = INFINITE.model_copy(update={"kind": kind})
    short = [learning_rate(schedule, step, 60, first=True) for step in range(50)]
    long = [learning_rate(schedule, step, 5000, first=True) for step in range(50)]
    assert short == long


def test_later_updates_warm_up_to_the_constant_rate_and_skip_the_peak() -> None:
    rates = [learning_rate(INFINITE, step, 100, first=False) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) / 10 for i in range(10)])
    assert rates[10:90] == pytest.approx([0.1] * 80)
    assert rates[99] == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["infinite", "rsqrt"])
@pytest.mark.parametrize("first", [True, False])
def test_a_short_update_warms_up_for_a_quarter_of_its_steps(kind: str, first: bool) -> None:
    schedule = INFINITE.model_copy(update={"kind": kind, "anneal_steps": 0})
    rates = [learning_rate(schedule, step, 8, first) for step in range(8)]
    assert rates[0] == pytest.approx(rates[1] / 2)
    assert rates[1:] == pytest.approx([rates[1]] * 7)
    (only,) = [learning_rate(schedule, step, 1, first) for step in range(1)]
    assert only == pytest.approx(rates[1])


def test_an_update_shorter_than_its_anneal_still_ends_at_the_final_rate() -> None:
    rates = [learning_rate(INFINITE, step, 3, first=True) for step in range(3)]
    assert rates[-1] == pytest.approx(0.01)
    assert all(rate > 0 for rate in rates)


def test_cosine_equals_its_formula() -> None:
    schedule = Schedule(kind="cosine", peak=1.0, final=0.1, warmup_steps=5)
    rates = [learning_rate(schedule, step, 25, first=False) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * i / 20)) for i in range(1, 21)])
    assert rates[14] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_infinite_equals_its_formula_at_every_step() -> None:
    def plain(step: int) -> float:
        if step < 10:
            return (step + 1) / 10
        if step < 30:
            return 0.1 + (1.0 - 0.1) * (1 + math.cos(math.pi * (step - 9) / 20)) / 2
        return 0.1 if step < 90 else 0.1 * (0.01 / 0.1) ** ((step - 89) / 10)

    rates = [learning_rate(INFINITE, step, 100, first=True) for step in range(100)]
    assert rates == pytest.approx([plain(step) for step in range(100)])


def test_rsqrt_equals_its_formula_at_every_step() -> None:
    schedule = Schedule(kind="rsqrt", peak=2.0, final=0.01, warmup_steps=4, anneal_steps=10)

    def plain(step: int) -> float:
        return 2.0 * min((step + 1) / 4, math.sqrt(4 / (step + 1)))

    rates = [learning_rate(schedule, step, 50, first=True) for step in range(50)]
    assert rates[:40] == pytest.approx([plain(step) for step in range(40)])
    assert rates[40:] == pytest.approx([plain(40) * (0.01 / plain(40)) ** (i / 10) for i in range(1, 11)])


@pytest.mark.parametrize("kind", ["infinite", "rsqrt", "cosine"])
def test_the_meta_schedule_lowers_every_rate_from_update_to_update(kind: str) -> None:
    plain = INFINITE.model_copy(update={"kind": kind})
    schedule = plain.model_copy(update={"updates": "rsqrt"})
    for update in (0, 1, 2, 50):
        factor = math.sqrt((update + 1) * 10 / (update * 100 + 10))
        for step in (0, 40, 99):
            rate = learning_rate(schedule, step, 100, True, update)
            assert rate == pytest.approx(factor * learning_rate(plain, step, 100, True))
    falling = [meta_factor(schedule, update, 100) for update in range(200)]
    assert falling[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    assert falling[-1] > math.sqrt(10 / 100)


def test_the_meta_schedule_never_raises_a_rate() -> None:
    schedule = INFINITE.model_copy(update={"updates": "rsqrt"})
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
def test_the_mean_is_of_the_start_every_so_many_steps_and_the_last(
    every: int, values: list[float], mean: float
) -> None:
    assert _walk(every, values) == pytest.approx(mean)


def test_an_update_hands_over_the_mean_of_its_parameters(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[dict[str, Tensor]] = []
    handed: dict[str, Tensor] = {}

    def copy(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    original_update, original_apply = Learner.optimizer_step, Average.apply

    def update(self: AnyLearner, rate: float, step: int = 0, steps: int = 1) -> None:
        if not passed:
            passed.append(copy(self.parameters))
        original_update(self, rate, step, steps)
        passed.append(copy(self.parameters))

    def apply(self: Average, parameters: Mapping[str, nn.Parameter]) -> None:
        original_apply(self, parameters)
        handed.update(copy(parameters))

    monkeypatch.setattr(Learner, "optimizer_step", update)
    monkeypatch.setattr(Average, "apply", apply)
    plan = recipe("zscl", average_every=2, max_steps=5)
    result = run(base, tmp_path, recipe=plan)
    assert len(passed) == 6 and set(handed) == set(passed[0])
    for name, value in handed.items():
        expected = torch.stack([passed[step][name] for step in (0, 2, 4, 5)]).mean(dim=0)
        assert torch.allclose(value, expected, atol=1e-7)
    written = read_delta(result.directory, base)
    layers = [name for name in written if name.endswith("c_fc")]
    assert layers
    for name in layers:
        factors = handed[f"{name}.lora_B"].double() @ handed[f"{name}.lora_A"].double()
        part = written[name]
        assert isinstance(part, LowRank) and torch.allclose(part.dense(), plan.alpha / plan.rank * factors, atol=1e-7)
