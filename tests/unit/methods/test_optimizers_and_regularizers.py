"""GaLore and regularizers against their steps written out, and what they save or preserve."""

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
from updater.methods import optimizers, regularizers
from updater.recipes import Optimizer

OPTIONS = {"rank": 2, "every": 3, "scale": 0.5, "beta1": 0.8, "beta2": 0.9}


def made(*parameters: nn.Parameter, weight_decay: float = 0.1, **options: float) -> torch.optim.Optimizer:
    wanted = Optimizer(kind="galore", options=OPTIONS | options)
    optimizer = optimizers.make(wanted, [{"params": list(parameters), "factor": 1.0}], weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    return optimizer


def gradient(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (4, 2, 3, 1)])
def test_steps_are_adam_in_the_subspace_of_the_gradient(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(gradient(100, *shape))
    optimizer = made(parameter)
    expected = parameter.detach().double().flatten(1)
    tall = expected.shape[0] > expected.shape[1]
    for step in range(5):  # the subspace is recomputed at step 3
        parameter.grad = gradient(step, *shape)
        optimizer.step()
        g = gradient(step, *shape).double().flatten(1)
        g = g.T if tall else g
        if step % 3 == 0:
            projection = torch.linalg.svd(g)[0][:, :2]
            # A singular vector has no sign: take the optimizer's.
            own = optimizer.state[parameter]["projector"].double()[:, [1, 0]]
            projection = projection * (projection * own).sum(dim=0).sign()
            torch.testing.assert_close(projection, own, rtol=0, atol=1e-4)
        small = projection.T @ g
        if step == 0:
            first, second = torch.zeros_like(small), torch.zeros_like(small)
        first = 0.8 * first + 0.2 * small
        second = 0.9 * second + 0.1 * small**2
        normed = first / (1 - 0.8 ** (step + 1)) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        change = 0.5 * projection @ normed
        expected = expected * (1 - 0.05 * 0.1) - 0.05 * (change.T if tall else change)
        torch.testing.assert_close(parameter.detach().double().flatten(1), expected, rtol=0, atol=2e-4)


def test_vectors_and_small_matrices_have_plain_adamw() -> None:
    own, theirs = ([nn.Parameter(gradient(7, 9)), nn.Parameter(gradient(8, 2, 9))] for _ in range(2))
    both = (own, made(*own)), (theirs, torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9)))
    for step in range(4):
        for parameters, optimizer in both:
            for parameter in parameters:
                parameter.grad = gradient(step, *parameter.shape)
            optimizer.step()
    for one, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_its_state_is_as_small_as_it_says() -> None:
    parameters = [nn.Parameter(gradient(1, *shape)) for shape in ((40, 30), (30, 50), (7,), (2, 9))]
    optimizer = made(*parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        held = sum(4 * value.numel() for key, value in optimizer.state[parameter].items() if key != "step")
        assert optimizers.state_bytes(optimizer, parameter) == held
    assert optimizers.state_bytes(optimizer, parameters[0]) < 0.1 * 2 * 4 * 40 * 30
    adamw = torch.optim.AdamW(parameters)
    assert optimizers.state_bytes(adamw, parameters[0]) == 2 * 4 * 40 * 30


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
    # b never had a gradient, a[0] only zeros: they cost nothing at any distance.
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
def test_importance_is_remembered_and_felt_in_the_next_update(base: ClipBase, tmp_path: Path, name: str) -> None:
    """With the shipped strength; at strength 1 and damping 1 the penalty's gradient was a millionth of theirs."""
    first = run(base, tmp_path / "first", recipe=recipe(name, **IMAGES))
    assert first.carry_over is not None
    known = load_file(first.carry_over / "memory.safetensors")
    assert known and all(key.startswith(f"term/regularizer.{name}.") for key in known)
    assert all(float(value.min()) >= 0 for value in known.values())
    assert first.losses[name] == [0.0] * first.steps
    again = {"pools": pools(replay=12), "incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    term, moved = recipe(name).regularizers[0].model_dump(mode="json"), []
    for weight in (0.0, term["weight"]):
        plan = recipe(name, regularizers=[{**term, "weight": weight}], **IMAGES)
        done = run(base, tmp_path / f"{weight}", recipe=plan, **again)
        delta, start = (read_delta(directory, base) for directory in (done.directory, first.directory))
        steps = combine([(1.0, delta), (-1.0, start)]).values()
        moved.append(torch.cat([part.value.flatten() for part in steps if isinstance(part, Dense)]))
    assert done.losses[name][0] == 0 < done.losses[name][-1]
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


@pytest.mark.parametrize(
    ("name", "options", "plan", "words"),
    [
        ("ewc", {}, "default", "compares weights between updates"),
        ("si", {}, "default", "compares weights between updates"),
        ("ewc", {"batches": 0}, "full", "batches"),
        ("si", {"xi": 0.0}, "full", "xi"),
        ("orthogonal", {"most": 0}, "full", "most"),
    ],
)
def test_importance_of_factors_and_an_option_without_a_meaning_are_refused(
    name: str, options: dict[str, float], plan: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        regularizers.build(recipe(plan, regularizers=[{"name": name, "options": options}]))
    with pytest.raises(ConfigError, match="rank or every"):
        made(rank=0)
