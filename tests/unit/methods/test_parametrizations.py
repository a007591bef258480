"""Each parametrization against its paper's formula, written with loops, and what it is there for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ratchet_methods.parametrizations.parametrization import Parametrization
from updater.adapters.kinds import KINDS

Matrix = list[list[float]]


def parametrization(
    name: str, weight: Tensor, rank: int = 2, alpha: float = 6.0, moved: bool = True, **options: Any
) -> Parametrization:
    """A parametrization on a weight, its parameters moved from where they start unless told otherwise."""
    layer = KINDS.find(name)(weight, rank, alpha, torch.Generator().manual_seed(1), **options)
    shift = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            if moved and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=shift))
    return layer


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def product(one: Matrix, other: Matrix) -> Matrix:
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*other, strict=True)] for row in one
    ]


def added(one: Matrix, other: Matrix, times: float = 1.0) -> Matrix:
    return [[a + times * b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]


def scaled_rows(factors: list[float], rows: Matrix) -> Matrix:
    return [[factor * value for value in row] for factor, row in zip(factors, rows, strict=True)]


def plain(name: str, layer: Any, start: Matrix, rank: int, alpha: float) -> Matrix:
    """W' as the paper has it."""
    if name == "dora":
        direction = added(start, product(layer.b.tolist(), layer.a.tolist()), alpha / rank)
        norms = [math.sqrt(sum(value**2 for value in row)) for row in direction]
        return scaled_rows([m / n for (m,), n in zip(layer.magnitude.tolist(), norms, strict=True)], direction)
    if name == "vera":
        inside = scaled_rows([d for (d,) in layer.inner.tolist()], layer.a.tolist())
        return added(start, scaled_rows([b for (b,) in layer.outer.tolist()], product(layer.b.tolist(), inside)))
    if name == "codyra":
        return added(
            start,
            product(layer.b.tolist(), scaled_rows([g for (g,) in layer.g.tolist()], layer.a.tolist())),
        )
    if name == "nusa_cl":
        return added(start, product(product(layer.u.tolist(), layer.middle.tolist()), layer.v.tolist()))
    return added(start, layer.difference.tolist())


NAMES = ("dora", "vera", "codyra", "nusa_cl", "full")


@pytest.mark.parametrize("name", NAMES)
def test_the_effective_weight_is_the_papers_formula(name: str) -> None:
    start = weight(5, 7)
    layer = parametrization(name, start)
    torch.testing.assert_close(
        layer(start), torch.tensor(plain(name, layer, start.tolist(), 2, 6.0)), rtol=0, atol=1e-5
    )
    assert float((layer(start) - start).detach().norm()) > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 4, 1, 1), (3, 8, 2, 2)])
def test_before_the_first_step_nothing_has_changed_and_something_learns(name: str, shape: tuple[int, ...]) -> None:
    start = weight(*shape)
    layer = parametrization(name, start, moved=False)
    effective = layer(start)
    assert torch.equal(effective, start)
    (effective * weight(*shape).cos()).sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


@pytest.mark.parametrize("name", ["vera", "codyra", "nusa_cl"])
@pytest.mark.parametrize("shape", [(5, 7), (6, 4, 1, 1)])
def test_factors_are_the_difference(name: str, shape: tuple[int, ...]) -> None:
    start = weight(*shape)
    layer = parametrization(name, start)
    a, b = layer.factors() or (torch.empty(0), torch.empty(0))
    assert a.shape[0] == b.shape[1] == 2
    torch.testing.assert_close((b @ a).view(shape), layer(start) - start, rtol=0, atol=1e-5)


def test_doras_gradient_takes_the_norm_as_a_constant() -> None:
    start = weight(5, 7)
    layer: Any = parametrization("dora", start)
    toward = weight(7, 5).T
    (layer(start) * toward).sum().backward()
    norms = (start + 3.0 * layer.b @ layer.a).detach().norm(dim=1, keepdim=True)
    expected = 3.0 * (layer.magnitude.detach() / norms * toward) @ layer.a.detach().T
    torch.testing.assert_close(layer.b.grad, expected, rtol=1e-4, atol=1e-5)


def test_vera_shares_its_matrices_by_shape_and_its_updates_add_up_to_one_rank() -> None:
    one, other = (KINDS.find("vera")(weight(12, 9), 3, 6.0, torch.Generator().manual_seed(seed)) for seed in (4, 5))
    frozen = [{n: p for n, p in layer.named_parameters() if not p.requires_grad} for layer in (one, other)]
    assert frozen[0].keys() == frozen[1].keys() == {"a", "b"}
    assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in "ab")
    assert sum(p.numel() for p in one.parameters() if p.requires_grad) == 12 + 3
    with torch.no_grad():
        for seed, layer in enumerate((one, other)):
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    start = weight(12, 9)
    both = (one(start) - start) + (other(start) - start)
    assert int(torch.linalg.matrix_rank(both, rtol=1e-5)) == 3


def test_codyra_prunes_small_ranks_in_the_second_half_only() -> None:
    start = weight(5, 7)
    layer: Any = parametrization("codyra", start, rank=3, shrinkage=0.2)
    with torch.no_grad():
        layer.g.copy_(torch.tensor([[0.12], [-0.9], [-0.05]]))
        expected = [0.12, -0.9, -0.05]
        for step in range(5):
            layer.stepped(step, 5)
            threshold = 0.0 if step < 2 else 0.2 * (step - 1) / 6
            expected = [math.copysign(max(abs(g) - threshold, 0.0), g) for g in expected]
            assert layer.g.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] == 0 and expected[2] == 0 and expected[1] == pytest.approx(-0.7)
    assert int(torch.linalg.matrix_rank(layer(start) - start, rtol=1e-5)) == 1


@pytest.mark.parametrize("steps", [1, 12, 100])
def test_codyra_prunes_about_half_of_its_ranks_in_an_update_of_any_length(steps: int) -> None:
    layer: Any = parametrization("codyra", weight(5, 7), rank=1000, moved=False)
    with torch.no_grad():
        for step in range(steps):
            layer.stepped(step, steps)
    assert 0.42 < float((layer.g == 0).float().mean()) < 0.52


def test_nusa_goes_on_with_the_directions_of_its_checkpoint() -> None:
    """Another machine may find the same directions with other signs."""
    start = weight(6, 6)
    one: Any = parametrization("nusa_cl", start)
    kept = {name: value.clone() for name, value in one.state().items()}
    other: Any = parametrization("nusa_cl", start)
    other.u.mul_(-1)
    with torch.no_grad():
        other.middle.copy_(one.middle)
    assert not torch.allclose(other(start), one(start), atol=1e-3)
    other.load_state(kept)
    assert torch.equal(other(start), one(start))
