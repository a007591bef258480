"""The mean of where the parameters passed, and that it is what an update hands over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import recipe, run
from updater.adapters import LowRank, read_delta
from updater.methods.optimizers import Average
from updater.step.learner import AnyLearner, Learner


def _walk(every: int, values: list[float]) -> float:
    """What is handed over after a walk from 0 through these values."""
    parameters = {"w": nn.Parameter(torch.zeros(2))}
    average = Average(parameters, every)
    for value in values:
        parameters["w"].data.fill_(value)
        average.stepped(parameters)
    resumed = Average(parameters, every)
    resumed.load_state(average.state())
    for each in (average, resumed):
        parameters["w"].data.fill_(values[-1])
        each.settle(parameters)
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

    original_update, original_settle = Learner.optimizer_step, Learner.settle

    def update(self: AnyLearner, rate: float, step: int = 0, steps: int = 1) -> None:
        if not passed:
            passed.append(copy(self.parameters))
        original_update(self, rate, step, steps)
        passed.append(copy(self.parameters))

    def settle(self: AnyLearner) -> None:
        original_settle(self)
        handed.update(copy(self.parameters))

    monkeypatch.setattr(Learner, "optimizer_step", update)
    monkeypatch.setattr(Learner, "settle", settle)
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
