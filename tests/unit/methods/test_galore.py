"""GaLore against its steps written out, and the memory that it is there to save."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from updater.methods import optimizers
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
    for step in range(5):  # the subspace is taken anew at step 3
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
    optimizer = made(*own)
    reference = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), foreach=False)
    for step in range(4):
        for one, other in zip(own, theirs, strict=True):
            one.grad, other.grad = gradient(step, *one.shape), gradient(step, *other.shape)
        optimizer.step()
        reference.step()
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
