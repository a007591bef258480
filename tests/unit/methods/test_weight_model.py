"""A base that learns through parametrizations: what is in training, what it says of itself, and what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import AdapterError, ConfigError
from ratchet_methods.parametrizations.parametrization import WeightModel, dense_delta
from serving.engines.backends import golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from tests.support.tiny import RANK, tiny_adapter
from tests.unit.updater.builders import recipe, run
from updater.adapters import Dense, LoraModel, LowRank, WeightDelta, merge, read_delta
from updater.adapters.kinds import KINDS

NAMES = [name for name in KINDS.names() if name != "lora"]
TEXTS = ["a cat", "two dogs on the beach"]


@pytest.fixture(scope="module")
def starts(base: ClipBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightDelta]:
    """What an update may begin with: nothing, LoRA on every layer, or every parameter replaced."""
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
    """As if it had learned something."""
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
    """Every parameter of the base as the model uses it."""
    modules = dict(model.model.named_modules())
    found = {}
    for name in dict(model.frozen.build_model().named_parameters()):
        owner, _, attribute = name.rpartition(".")
        found[name] = getattr(modules[owner], attribute).detach()
    return found


def with_delta(base: ClipBase, delta: WeightDelta) -> dict[str, Tensor]:
    plain = base.build_model()
    dense = dense_delta(delta, plain)
    return {n: (p.double() + dense.get(n, 0)).float() for n, p in plain.named_parameters()}


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("begin", ["base", "factors", "whole"])
def test_what_is_in_training_is_what_it_says_and_what_is_served(
    base: ClipBase, starts: dict[str, WeightDelta], tmp_path: Path, kind: str, begin: str
) -> None:
    start = starts[begin]
    model = model_of(base, kind, start)
    agree(in_training(model), with_delta(base, start))  # before the first step: the incumbent
    move(model, 0.05)
    now = in_training(model)
    assert any(not torch.allclose(now[n], value, atol=1e-3) for n, value in with_delta(base, start).items())
    agree(now, with_delta(base, model.delta()))
    model.write(model.delta(), tmp_path / "adapter")
    plain = base.build_model()
    agree(now, dict(plain.named_parameters()) | effective_weights(tmp_path / "adapter", plain))
    agree(now, with_delta(base, read_delta(tmp_path / "adapter", base)))
    served = shell_of(plain, effective_weights(tmp_path / "adapter", plain))
    assert torch.allclose(outputs(model.model, base), outputs(served, base), atol=1e-5)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("begin", ["factors", "whole"])
def test_inside_base_the_model_is_the_base_bit_by_bit(
    base: ClipBase, starts: dict[str, WeightDelta], kind: str, begin: str
) -> None:
    model = model_of(base, kind, starts[begin])
    move(model, 0.05)
    before = outputs(model.model, base)
    with model.base():
        assert torch.equal(outputs(model.model, base), outputs(base.build_model(), base))
    assert torch.equal(outputs(model.model, base), before)
    assert not torch.allclose(before, outputs(base.build_model(), base), atol=1e-2)


def test_ranks_that_add_up_are_written_whole_and_others_as_factors(
    base: ClipBase, starts: dict[str, WeightDelta], tmp_path: Path
) -> None:
    alone = model_of(base, "nusa_cl", {})
    move(alone, 0.05)
    alone.write(alone.delta(), tmp_path / "one")
    assert all(isinstance(part, LowRank) and part.rank == RANK for part in read_delta(tmp_path / "one", base).values())
    after = model_of(base, "nusa_cl", starts["factors"], text={"locked": True})
    move(after, 0.05)
    after.write(after.delta(), tmp_path / "two")
    written = read_delta(tmp_path / "two", base)
    assert all(isinstance(part, Dense) == name.startswith("visual.") for name, part in written.items())
    # A third update adds factors to whole weights, and a fourth has to make them one.
    third = model_of(base, "nusa_cl", written, text={"locked": True})
    move(third, 0.05)
    third.write(third.delta(), tmp_path / "three")
    assert {type(part) for n, part in read_delta(tmp_path / "three", base).items() if n.startswith("visual.")} == {
        Dense, LowRank,
    }  # fmt: skip
    fourth = model_of(base, "nusa_cl", read_delta(tmp_path / "three", base), text={"locked": True})
    move(fourth, 0.05)
    fourth.write(fourth.delta(), tmp_path / "four")
    plain = base.build_model()
    agree(in_training(fourth), dict(plain.named_parameters()) | effective_weights(tmp_path / "four", plain))


@pytest.mark.parametrize("kind", ["full", "bias", "nusa_cl"])
def test_a_locked_tower_keeps_its_space_though_the_incumbent_changed_it(
    base: ClipBase, starts: dict[str, WeightDelta], tmp_path: Path, kind: str
) -> None:
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


def test_a_merge_of_factors_and_whole_weights_is_between_both(
    base: ClipBase, starts: dict[str, WeightDelta], tmp_path: Path
) -> None:
    model = model_of(base, "full", starts["factors"])
    move(model, 0.05)
    model.write(merge(starts["factors"], model.delta(), 0.25), tmp_path / "merged")
    plain = base.build_model()
    merged = dict(plain.named_parameters()) | effective_weights(tmp_path / "merged", plain)
    old, new = with_delta(base, starts["factors"]), in_training(model)
    # The file's LoRA is of the recipe's rank, as is the incumbent's here: nothing is lost.
    agree({n: 0.75 * old[n] + 0.25 * new[n] for n in old}, {n: p.detach() for n, p in merged.items()})


@pytest.mark.parametrize("whole", [True, False])
def test_lora_has_whole_weights_in_force_but_inside_base(
    base: ClipBase, starts: dict[str, WeightDelta], tmp_path: Path, whole: bool
) -> None:
    """Also after a pass: PEFT then has made new parameters of attention."""
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
    """Their outputs are not the base's: the prefix that is computed once must not be taken from it."""
    first = run(base, tmp_path / "first", recipe=recipe("bit-fit", schedule={"kind": "cosine", "peak": 0.2}))
    still = recipe("naive", image={"blocks": 1}, text={"blocks": 1}, schedule={"peak": 1e-30, "constant": 1e-30})
    second = run(base, tmp_path / "second", recipe=still, incumbent=first.directory)
    whole = run(base, tmp_path / "whole", recipe=recipe("naive", **_still()), incumbent=first.directory)
    assert second.losses["contrastive"][0] == pytest.approx(whole.losses["contrastive"][0], rel=1e-4)
    fresh = run(base, tmp_path / "fresh", recipe=recipe("naive", **_still()))
    assert abs(fresh.losses["contrastive"][0] - whole.losses["contrastive"][0]) > 0.01


def _still() -> dict[str, Any]:
    return {"image": {}, "text": {}, "schedule": {"peak": 1e-30, "constant": 1e-30}}


def test_vera_never_outgrows_its_rank(base: ClipBase, tmp_path: Path) -> None:
    start: WeightDelta = {}
    for update in range(3):
        model = model_of(base, "vera", start, seed=update)
        move(model, 0.3, seed=update)
        model.write(model.delta(), tmp_path / str(update))
        start = read_delta(tmp_path / str(update), base)
        assert all(isinstance(part, LowRank) and part.rank == RANK for part in start.values())
        plain = base.build_model()
        agree(in_training(model), dict(plain.named_parameters()) | effective_weights(tmp_path / str(update), plain))


def test_what_a_kind_does_not_know_is_refused_by_name(base: ClipBase) -> None:
    with pytest.raises(ConfigError, match="no adapter kind 'lora2'"):
        model_of_kind(base, "lora2", {})
    with pytest.raises(ConfigError, match="kapa"):
        model_of_kind(base, "codyra", {"kapa": 1.0})


def test_an_incumbent_of_another_base_is_refused_by_name(base: ClipBase) -> None:
    with pytest.raises(AdapterError, match=r"visual\.nowhere"):
        model_of(base, "full", {"visual.nowhere": LowRank(torch.ones(4, 8).double(), torch.ones(8, 4).double())})


def model_of_kind(base: ClipBase, kind: str, options: dict[str, Any]) -> WeightModel:
    return WeightModel(base, ["visual.transformer.resblocks.1.mlp.c_fc.weight"], kind, options, RANK, 8.0, {}, 0)
