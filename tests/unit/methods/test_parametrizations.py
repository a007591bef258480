"""Parametrizations against their papers' formulas, and the base that learns through them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import AdapterError, ConfigError
from ratchet_methods.parametrizations.parametrization import Parametrization, WeightModel, dense_delta
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from serving.engines.processor import golden_pixels
from tests.support.tiny import RANK, tiny_adapter
from tests.unit.updater.builders import recipe, run
from updater.adapters import Dense, LoraModel, LowRank, WeightDelta, merge, read_delta
from updater.adapters.kinds import KINDS

Matrix = list[list[float]]
Starts = dict[str, WeightDelta]


def parametrization(
    name: str, weight: Tensor, rank: int = 2, alpha: float = 6.0, moved: bool = True, **options: Any
) -> Parametrization:
    """A parametrization on a weight, with parameters moved from their start by default."""
    layer = KINDS.find(name)(weight, rank, alpha, torch.Generator().manual_seed(1), **options)
    shift = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            if moved and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=shift))
    return layer


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def product(*matrices: Matrix) -> Matrix:
    first, *rest = matrices
    for other in rest:
        columns = list(zip(*other, strict=True))
        first = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in first]
    return first


def added(one: Matrix, other: Matrix, times: float = 1.0) -> Matrix:
    return [[a + times * b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]


def scaled_rows(factors: Matrix, rows: Matrix) -> Matrix:
    return [[factor * value for value in row] for (factor,), row in zip(factors, rows, strict=True)]


def plain(name: str, layer: Any, start: Matrix, rank: int, alpha: float) -> Matrix:
    of = {key: value.tolist() for key, value in layer.state_dict().items()}
    match name:
        case "dora":
            direction = added(start, product(of["b"], of["a"]), alpha / rank)
            norms = [[math.sqrt(sum(value**2 for value in row))] for row in direction]
            return scaled_rows([[m / n] for (m,), (n,) in zip(of["magnitude"], norms, strict=True)], direction)
        case "vera":
            return added(start, scaled_rows(of["outer"], product(of["b"], scaled_rows(of["inner"], of["a"]))))
        case "codyra":
            return added(start, product(of["b"], scaled_rows(of["g"], of["a"])))
        case "nusa_cl":
            return added(start, product(of["u"], of["middle"], of["v"]))
        case "keep_lora":
            return added(start, product(of["b"], of["a"]))
    return added(start, of["difference"])


NAMES = ("dora", "vera", "codyra", "nusa_cl", "keep_lora", "full")


@pytest.mark.parametrize("name", NAMES)
def test_the_effective_weight_is_the_papers_formula(name: str) -> None:
    start = weight(5, 7)
    layer = parametrization(name, start)
    expected = torch.tensor(plain(name, layer, start.tolist(), 2, 6.0))
    torch.testing.assert_close(layer(start), expected, rtol=0, atol=1e-5)
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


@pytest.mark.parametrize("name", ["vera", "codyra", "nusa_cl", "keep_lora"])
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


def test_vera_shares_its_matrices_by_shape() -> None:
    one, other = (KINDS.find("vera")(weight(12, 9), 3, 6.0, torch.Generator().manual_seed(seed)) for seed in (4, 5))
    frozen = [{n: p for n, p in layer.named_parameters() if not p.requires_grad} for layer in (one, other)]
    assert frozen[0].keys() == frozen[1].keys() == {"a", "b"}
    assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in "ab")
    assert sum(p.numel() for p in one.parameters() if p.requires_grad) == 12 + 3


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


def test_keep_lora_learns_in_the_gradients_directions_outside_of_the_principal_ones() -> None:
    start = weight(40, 30)
    layer: Any = parametrization("keep_lora", start, rank=3, moved=False, energy=0.5)
    gradient = weight(40, 3) @ weight(3, 30).cos()  # of rank 3
    (layer(start) * gradient).sum().backward()
    layer.stepped(0, 10)
    outside = gradient - gradient @ layer.principal.T @ layer.principal
    torch.testing.assert_close(outside @ layer.a.T @ layer.a, outside, rtol=1e-3, atol=1e-3)
    assert float((layer.a @ layer.principal.T).abs().max()) < 1e-4
    torch.testing.assert_close(layer.a @ layer.a.T, torch.eye(3), rtol=0, atol=1e-5)
    assert torch.equal(layer(start), start) and not layer.a.requires_grad
    other: Any = parametrization("keep_lora", start, rank=3, moved=False, energy=0.5)
    assert not other.state()
    other.load_state(layer.state())
    other.stepped(0, 10)
    assert not other.a.requires_grad and bool(other.b.any())


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


TRAINED_KINDS = [name for name in KINDS.names() if name != "lora"]
TEXTS = ["a cat", "two dogs on the beach"]


@pytest.fixture(scope="module")
def starts(base: ClipBase, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    folder = tmp_path_factory.mktemp("incumbents")
    tiny_adapter(base, folder / "lora", seed=1, scale=0.2)
    full = model_of(base, "full", {})
    move(full, 0.02)
    full.write(full.delta(), folder / "whole")
    return {"base": {}, "factors": read_delta(folder / "lora", base), "whole": read_delta(folder / "whole", base)}


def model_of(base: ClipBase, kind: str, start: WeightDelta, seed: int = 0, **changes: Any) -> WeightModel:
    """All of the towers learn, unless ``changes`` of the recipe say otherwise."""
    plan = recipe("full", adapter={"kind": kind}, rank=RANK, alpha=8.0, **changes)
    _, model = KINDS.find(kind).build(base, base.build_model(), plan, start, seed, "cpu")
    assert isinstance(model, WeightModel)
    return model


def move(model: WeightModel, size: float, seed: int = 3) -> None:
    """Change it as if it had learned something."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=made))


@torch.no_grad()
def outputs(model: nn.Module, base: ClipBase) -> Tensor:
    clip: Any = model
    pixels = base.preprocess.normalise(golden_pixels(base.preprocess.size)[:2])
    return torch.cat([clip.encode_image(pixels), clip.encode_text(base.tokenizer()(TEXTS))])


def in_training(model: WeightModel) -> dict[str, Tensor]:
    modules = dict(model.model.named_modules())
    names = [name.rpartition(".") for name, _ in model.frozen.build_model().named_parameters()]
    return {f"{owner}.{own}" if owner else own: getattr(modules[owner], own).detach() for owner, _, own in names}


def in_service(base: ClipBase, folder: Path) -> dict[str, Tensor]:
    plain = base.build_model()
    return {n: p.detach() for n, p in plain.named_parameters()} | effective_weights(folder, plain)


def written(base: ClipBase, model: WeightModel, folder: Path) -> WeightDelta:
    model.write(model.delta(), folder)
    return read_delta(folder, base)


def with_delta(base: ClipBase, delta: WeightDelta) -> dict[str, Tensor]:
    plain = base.build_model()
    dense = dense_delta(delta, plain)
    return {n: (p.double() + dense.get(n, 0)).float() for n, p in plain.named_parameters()}


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


OFTEN = {"nusa_cl"}
"""Others start from the base and from whole weights only in `make long`."""
STARTS = [
    pytest.param(kind, begin, marks=() if begin == "factors" or kind in OFTEN else pytest.mark.long)
    for kind in TRAINED_KINDS
    for begin in ("base", "factors", "whole")
]


@pytest.mark.parametrize(("kind", "begin"), STARTS)
def test_what_is_trained_is_what_it_says_and_what_is_served(
    base: ClipBase, starts: Starts, tmp_path: Path, kind: str, begin: str
) -> None:
    start = starts[begin]
    model = model_of(base, kind, start)
    agree(in_training(model), with_delta(base, start))  # before the first step: the incumbent
    move(model, 0.05)
    now = in_training(model)
    assert any(not torch.allclose(now[n], value, atol=1e-3) for n, value in with_delta(base, start).items())
    agree(now, with_delta(base, model.delta()))
    agree(now, with_delta(base, written(base, model, tmp_path / "adapter")))
    agree(now, in_service(base, tmp_path / "adapter"))
    plain = base.build_model()
    served = shell_of(plain, effective_weights(tmp_path / "adapter", plain))
    assert torch.allclose(outputs(model.model, base), outputs(served, base), atol=1e-5)


@pytest.mark.parametrize("kind", TRAINED_KINDS)
@pytest.mark.parametrize("begin", ["factors", pytest.param("whole", marks=pytest.mark.long)])
def test_inside_base_the_model_is_the_base_exactly(base: ClipBase, starts: Starts, kind: str, begin: str) -> None:
    model = model_of(base, kind, starts[begin])
    move(model, 0.05)
    before = outputs(model.model, base)
    with model.base():
        assert torch.equal(outputs(model.model, base), outputs(base.build_model(), base))
    assert torch.equal(outputs(model.model, base), before)
    assert not torch.allclose(before, outputs(base.build_model(), base), atol=1e-2)


def test_ranks_that_add_up_are_written_whole(base: ClipBase, starts: Starts, tmp_path: Path) -> None:
    def update(name: str, start: WeightDelta, **changes: Any) -> tuple[WeightModel, WeightDelta]:
        model = model_of(base, "nusa_cl", start, **changes)
        move(model, 0.05)
        return model, written(base, model, tmp_path / name)

    locked = {"text": {"locked": True}}
    _, alone = update("one", {})
    assert all(isinstance(part, LowRank) and part.rank == RANK for part in alone.values())
    _, second = update("two", starts["factors"], **locked)
    assert all(isinstance(part, Dense) == name.startswith("visual.") for name, part in second.items())
    # A third update adds factors to whole weights, and a fourth has to make them one.
    _, third = update("three", second, **locked)
    assert {type(part) for name, part in third.items() if name.startswith("visual.")} == {Dense, LowRank}
    model, _ = update("four", third)
    agree(in_training(model), in_service(base, tmp_path / "four"))


@pytest.mark.parametrize("kind", ["full", "bias", "nusa_cl"])
def test_a_locked_tower_keeps_the_incumbents_space(base: ClipBase, starts: Starts, tmp_path: Path, kind: str) -> None:
    engine = ClipEngine(base)
    incumbent = tiny_adapter(base, tmp_path / "incumbent", seed=1, scale=0.2)
    before = engine.load(incumbent, tmp_path / "incumbent")
    model = model_of(base, kind, starts["factors"], text={"locked": True})
    move(model, 0.05)
    whole = merge(starts["factors"], model.delta(), 0.9)
    name = model.write(whole, tmp_path / "next")
    after = engine.load(name, tmp_path / "next")
    assert after.text == before.text
    assert after.image != before.image


def test_a_merge_of_factors_and_whole_weights_is_between(base: ClipBase, starts: Starts, tmp_path: Path) -> None:
    model = model_of(base, "full", starts["factors"])
    move(model, 0.05)
    model.write(merge(starts["factors"], model.delta(), 0.25), tmp_path / "merged")
    old, new = with_delta(base, starts["factors"]), in_training(model)
    # The file's LoRA is of the recipe's rank, as is the incumbent's here: nothing is lost.
    agree({n: 0.75 * old[n] + 0.25 * new[n] for n in old}, in_service(base, tmp_path / "merged"))


@pytest.mark.parametrize("whole", [True, False])
def test_lora_has_whole_weights_but_inside_base(base: ClipBase, starts: Starts, tmp_path: Path, whole: bool) -> None:
    """Also after a pass, in which PEFT makes new parameters of attention."""
    layers = ["visual.transformer.resblocks.0.attn", "transformer.resblocks.1.mlp.c_fc"]
    start = starts["whole" if whole else "factors"]
    model = LoraModel(base, layers, RANK, 8.0, start, seed=0)
    for _ in range(2):
        found = outputs(model.model, base)
        model.restore()
        served = base.build_model()
        served.load_state_dict(with_delta(base, start), strict=False)
        assert torch.allclose(found, outputs(served, base), atol=1e-5)
        with model.base():
            assert torch.allclose(outputs(model.model, base), outputs(base.build_model(), base), atol=1e-6)


def test_lora_goes_on_from_whole_weights_in_blocks_that_do_not_learn(base: ClipBase, tmp_path: Path) -> None:
    """Their outputs differ from the base's, so the prefix that is computed once must not come from the base."""
    still = {"peak": 1e-30, "constant": 1e-30}

    def first_loss(name: str, blocks: dict[str, Any], incumbent: Path | None) -> float:
        plan = recipe("naive", image=blocks, text=blocks, schedule=still)
        return run(base, tmp_path / name, recipe=plan, incumbent=incumbent).losses["contrastive"][0]

    first = run(base, tmp_path / "first", recipe=recipe("bit-fit", schedule={"kind": "cosine", "peak": 0.2}))
    whole = first_loss("whole", {}, first.directory)
    assert first_loss("second", {"blocks": 1}, first.directory) == pytest.approx(whole, rel=1e-4)
    assert abs(first_loss("fresh", {}, None) - whole) > 0.01


def test_vera_never_outgrows_its_rank(base: ClipBase, tmp_path: Path) -> None:
    start: WeightDelta = {}
    for update in range(3):
        model = model_of(base, "vera", start, seed=update)
        move(model, 0.3, seed=update)
        start = written(base, model, tmp_path / str(update))
        assert all(isinstance(part, LowRank) and part.rank == RANK for part in start.values())
        agree(in_training(model), in_service(base, tmp_path / str(update)))


def test_what_a_kind_does_not_know_is_refused_by_name(base: ClipBase) -> None:
    for kind, options, message in (("lora2", {}, "no adapter kind 'lora2'"), ("codyra", {"kapa": 1.0}, "kapa")):
        with pytest.raises(ConfigError, match=message):
            WeightModel(base, ["visual.transformer.resblocks.1.mlp.c_fc.weight"], kind, options, RANK, 8.0, {}, 0)
    with pytest.raises(AdapterError, match=r"visual\.nowhere"):
        model_of(base, "full", {"visual.nowhere": LowRank(torch.ones(4, 8).double(), torch.ones(8, 4).double())})
