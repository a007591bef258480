"""EWC and synaptic intelligence against plain sums, and what they hold in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from core.errors import ConfigError
from ratchet_methods.regularizers.ewc import Ewc
from ratchet_methods.regularizers.orthogonal import Orthogonal
from ratchet_methods.regularizers.si import Si
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import pools, recipe, run
from updater.adapters import Dense, combine, read_delta
from updater.methods import regularizers

IMAGES = {"text": {"locked": True}, "max_steps": 3}


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(1))}


def slopes(batch: int) -> list[float]:
    """The gradient of batch ``batch`` in ``a``; ``b`` is not used."""
    return [0.0, 1.0 + batch, -2.0 * batch]


def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_in_units_of_its_mean_and_adds_up() -> None:
    made, asked = parameters(), []

    def gradients(batch: int) -> None:
        asked.append(batch)
        made["a"].grad = torch.tensor(slopes(batch))

    ewc = Ewc(batches=3, keep=0.5)
    ewc.begin(made)
    assert float(ewc(made)) == 0
    ewc.finish(made, gradients)
    assert asked == [0, 1, 2] and ewc.passes == 3
    squares = [sum(slopes(batch)[i] ** 2 for batch in range(3)) / 3 for i in range(3)]
    fisher = [square / (sum(squares) / 4) for square in squares]  # three of a, one of b
    assert ewc.fisher["a"].tolist() == pytest.approx(fisher)
    again = Ewc(batches=3, keep=0.5)
    again.load_state({name: value.clone() for name, value in ewc.state().items()})
    again.finish(made, gradients)
    assert again.fisher["a"].tolist() == pytest.approx([1.5 * value for value in fisher])
    with torch.no_grad():
        made["a"].copy_(torch.tensor([5.0, 1.0, 2.0]))
        made["b"].fill_(3.0)
    # b never had a gradient, a[0] only zeros: they cost nothing however far they go.
    assert float(again(made)) == pytest.approx(0.5 * 1.5 * (fisher[1] * 1.0 + fisher[2] * 4.0))


def test_si_adds_up_what_each_step_gained() -> None:
    made, si = parameters(), Si(xi=0.1)
    si.begin(made)
    steps = [([0.0, 1.0, -1.0], [0.1, -0.2, 0.3]), ([1.0, -1.0, 1.0], [0.2, 0.3, 0.1])]
    path, change = [0.0] * 3, [0.0] * 3
    for number, (gradient, move) in enumerate(steps):
        assert float(si(made)) == 0
        made["a"].grad = torch.tensor(gradient)
        with torch.no_grad():
            made["a"].add_(torch.tensor(move))
        si.stepped(made)
        path = [p - g * m for p, g, m in zip(path, gradient, move, strict=True)]
        change = [c + m for c, m in zip(change, move, strict=True)]
        if number == 0:  # stopped and resumed in between
            kept = {name: value.clone() for name, value in si.state().items()}
            si = Si(xi=0.1)
            si.load_state(kept)
    si.finish(made, lambda batch: None)
    damping = 0.1 * sum(c**2 for c in change) / 3
    expected = [max(p, 0.0) / (c**2 + damping) for p, c in zip(path, change, strict=True)]
    assert si.total["a"].tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[0] == 0 and expected[1] > 0
    assert set(si.state()) == {"total.a"}
    assert float(si(made)) == pytest.approx(sum(o * c**2 for o, c in zip(expected, change, strict=True)), rel=1e-5)


@pytest.mark.parametrize("name", ["ewc", "si"])
def test_importance_is_remembered_and_holds_the_next_update(base: ClipBase, tmp_path: Path, name: str) -> None:
    first = run(base, tmp_path / "first", recipe=recipe(name, **IMAGES))
    assert first.carry_over is not None
    known = load_file(first.carry_over / "memory.safetensors")
    assert known and all(key.startswith(f"term/regularizer.{name}.") for key in known)
    assert all(float(value.min()) >= 0 for value in known.values())
    assert max(float(value.max()) for value in known.values()) > 0
    assert first.losses[name] == [0.0] * first.steps
    again = {"pools": pools(replay=12), "incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    plan = recipe(name, regularizers=[{"name": name, "weight": 1e4}], **IMAGES)
    second = run(base, tmp_path / "second", recipe=plan, **again)
    assert second.losses[name][0] == 0 and second.losses[name][-1] > 0
    free = recipe(name, regularizers=[{"name": name, "weight": 0.0}], **IMAGES)
    assert run(base, tmp_path / "free", recipe=free, **again).adapter != second.adapter


@pytest.mark.parametrize("name", ["ewc", "si"])
def test_the_shipped_strength_is_felt_beside_the_objectives(base: ClipBase, tmp_path: Path, name: str) -> None:
    """At strength 1 and damping 1 the penalty's gradient was a millionth of the objectives'."""
    first = run(base, tmp_path / "first", recipe=recipe(name, **IMAGES))
    again = {"pools": pools(replay=12), "incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    weight = recipe(name).regularizers[0].weight
    moved = []
    for share in (0.0, weight):
        options = recipe(name).regularizers[0].options
        plan = recipe(name, regularizers=[{"name": name, "weight": share, "options": options}], **IMAGES)
        done = run(base, tmp_path / f"{share}", recipe=plan, **again)
        delta, start = (read_delta(directory, base) for directory in (done.directory, first.directory))
        steps = combine([(1.0, delta), (-1.0, start)]).values()
        moved.append(torch.cat([part.value.flatten() for part in steps if isinstance(part, Dense)]))
    free, held = moved
    assert 0.01 < float((held - free).norm() / free.norm()) < 1


def test_factors_are_held_across_those_of_earlier_updates_and_these_are_remembered() -> None:
    first = {"x.lora_A": nn.Parameter(torch.tensor([[3.0, 0.0, 0.0]])), "x.lora_B": nn.Parameter(torch.ones(2, 1))}
    term = Orthogonal(most=2)
    assert float(term(first)) == 0
    term.finish(first, lambda batch: None)
    second = Orthogonal(most=2)
    second.load_state(term.state())
    made = {"x.lora_A": nn.Parameter(torch.tensor([[0.5, -2.0, 1.0]])), "x.lora_B": nn.Parameter(torch.ones(2, 1))}
    assert float(second(made)) == pytest.approx(0.5)
    optimizer = torch.optim.SGD(made.values(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        second(made).backward()
        optimizer.step()
    assert made["x.lora_A"][0].tolist() == pytest.approx([0.0, -2.0, 1.0], abs=0.06), "only what lies along moves"
    second.finish(made, lambda batch: None)
    assert second.state().keys() == {"x.lora_A"} and len(second.state()["x.lora_A"]) == 2
    second.finish(first, lambda batch: None)
    assert len(second.state()["x.lora_A"]) == 2, "the newest ones"


def test_importance_of_factors_is_refused() -> None:
    for name in ("ewc", "si"):
        with pytest.raises(ConfigError, match="compares weights between updates"):
            regularizers.build(recipe("default", regularizers=[{"name": name}]))
