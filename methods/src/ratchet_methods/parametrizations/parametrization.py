"""Parametrizations of weights: their interface, the weights they apply to, and the model that learns through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from core.errors import AdapterError
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.lora import INNER_OUT_PROJ, OUT_PROJ_TIMES
from updater.adapters import AdapterModel, Dense, LowRank, WeightDelta, combine
from updater.adapters.kinds import KINDS, AdapterKind
from updater.adapters.model import OTHER_BASE, WholeWeights, parameter_of, write_delta
from updater.adapters.trained_layers import Which, chosen_names, clip_layers, late_layers, tower_blocks
from updater.adapters.weight_deltas import fits
from updater.recipes import Recipe, Tower

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
Selects = Literal["layers", "norms", "biases", "all"]
"""Which weights are parametrized: those of layers that take LoRA, of normalisations, biases, or every parameter."""


class Parametrization(nn.Module, AdapterKind):
    """Parametrization of one weight, registered with ``torch.nn.utils.parametrize``. ``__init__`` takes the weight at
    the start of the update, the recipe's rank and alpha, a seeded generator, and the recipe's ``adapter.options`` as
    keyword arguments. Its ``nn.Parameter`` attributes learn. Set ``whole`` if W' alone could replace W."""

    selects: ClassVar[Selects] = "layers"

    @classmethod
    def build(
        cls, base: ClipBase, plain: nn.Module, recipe: Recipe, start: WeightDelta, seed: int, device: str
    ) -> tuple[list[str], AdapterModel]:
        weights = chosen_parameters(base, plain, recipe, cls.selects)
        return weights, WeightModel(
            base, weights, recipe.adapter.kind, recipe.adapter.options, recipe.rank, recipe.alpha, start, seed, device
        )

    def forward(self, weight: Tensor) -> Tensor:
        """Effective weight, in the weight's shape: W + b @ a, from :meth:`factors`."""
        factors = self.factors()
        assert factors is not None, "without factors, a kind has a forward of its own"
        return weight + (factors[1] @ factors[0]).view_as(weight)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(a [r, in], b [out, r]) with W' - W = b @ a for the weight as [out, in]; None if that is not low-rank."""
        return None

    def stepped(self, step: int, steps: int) -> None:
        """Called after each step of the optimizer."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


def matrix(weight: Tensor) -> Tensor:
    """Weight as [out, in]; a convolution's kernel counts as input."""
    return weight.flatten(1)


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator, like: Tensor) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, generator=generator) * std).to(like.device, like.dtype))


class WeightModel(AdapterModel):
    """A base with a :class:`Parametrization` on each of ``trained``, on top of the incumbent's ΔW."""

    def __init__(
        self,
        base: ClipBase,
        trained: Sequence[str],
        kind: str,
        options: Mapping[str, Any],
        rank: int,
        alpha: float,
        start: WeightDelta,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """``trained``: names of parameters of the base. Raises ConfigError for an unknown kind or option."""
        self.frozen, self.rank, self.alpha = base, rank, alpha
        self.device = torch.device(device)
        self.model = base.build_model().eval()
        self._plain = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._modules = dict(self.model.named_modules())
        self._start = dict(start)
        self._start_dense = _dense(start, self.model, base)
        self._whole = WholeWeights(self.model, {name: Dense(value) for name, value in self._start_dense.items()})
        self.model.requires_grad_(False)
        self.parametrizations: dict[str, Parametrization] = {}
        for number, name in enumerate(sorted(trained)):
            owner, _, attribute = name.rpartition(".")
            weight = getattr(self._modules[owner], attribute)
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            with KINDS.options_of(kind):
                learning = cast("type[Parametrization]", KINDS.find(kind))
                parametrization = learning(weight.detach().clone(), rank, alpha, generator, **options)
            switch = _Switch(parametrization)
            parametrize.register_parametrization(self._modules[owner], attribute, switch)
            self.parametrizations[name] = parametrization
        self._switches = [m for m in self.model.modules() if isinstance(m, _Switch)]
        self.model.to(self.device)
        self.parameters = {
            f"{name}.{part}": parameter
            for name, parametrization in self.parametrizations.items()
            for part, parameter in parametrization.named_parameters()
            if parameter.requires_grad
        }

    @property
    def base_names(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in (*self.parametrizations, *self._start_dense)})

    @property
    def replaced(self) -> list[nn.Module]:
        return [each for each in self.parametrizations.values() if each.whole]

    @contextmanager
    def base(self) -> Iterator[None]:
        self._use(False)
        try:
            yield
        finally:
            self._use(True)

    def _use(self, on: bool) -> None:
        for switch in self._switches:
            switch.on = on
        self._whole.use(on)

    @torch.no_grad()
    def delta(self) -> dict[str, LowRank | Dense]:
        learned: dict[str, LowRank | Dense] = {}
        replaced: set[str] = set()
        for name, parametrization in self.parametrizations.items():
            factors = parametrization.factors()
            if factors is None:
                effective = parametrization(self._started(name).to(self.device)).cpu().double()
                learned[name] = Dense(effective - self._plain[name].double())
                replaced.add(name)
                continue
            layer = self._layer(name)
            times = OUT_PROJ_TIMES if layer.endswith(INNER_OUT_PROJ) else 1.0
            a, b = (side.detach().double().cpu() for side in factors)
            learned[layer] = LowRank(a, b / times)
        carried = {
            name: part
            for name, part in self._start.items()
            if (parameter_of(name, self._modules) if isinstance(part, LowRank) else name) not in replaced
        }
        return combine([(1.0, carried), (1.0, learned)])

    def _started(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        original: Tensor = self._modules[owner].parametrizations[attribute].original
        return original.detach()

    def _layer(self, parameter: str) -> str:
        layer = parameter.rpartition(".")[0]
        owner, _, last = layer.rpartition(".")
        inside = last == "out_proj" and isinstance(self._modules.get(owner), nn.MultiheadAttention)
        return f"{owner}{INNER_OUT_PROJ}" if inside else layer

    def write(self, delta: WeightDelta, directory: Path) -> str:
        """Write factors that exceed the rank as whole weights; otherwise as for every adapter. Ranks add up when each
        update begins with new factors and is merged into the weights; repeated compression would lose what earlier
        updates learned."""
        unchanged = {
            name: part
            for name, part in self._start.items()
            if isinstance(part, LowRank) and parameter_of(name, self._modules) not in self.parametrizations
        }
        over = {n: part for n, part in delta.items() if isinstance(part, LowRank) and not fits(part, self.rank)}
        wholes = {name: Dense(value) for name, value in dense_delta(over, self.frozen.build_model()).items()}
        delta = combine([(1.0, {n: part for n, part in delta.items() if n not in over}), (1.0, wholes)])
        targets = sorted(name for name, part in delta.items() if isinstance(part, LowRank))
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "target_modules": targets}
        return write_delta(
            self.frozen, delta, directory, rank=self.rank, alpha=self.alpha, config=config, unchanged=unchanged
        )

    def stepped(self, step: int, steps: int) -> None:
        for parametrization in self.parametrizations.values():
            parametrization.stepped(step, steps)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parametrization in self.parametrizations.items()
            for key, value in parametrization.state().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parametrization in self.parametrizations.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            if own:
                parametrization.load_state(own)


class _Switch(nn.Module):
    def __init__(self, parametrization: Parametrization) -> None:
        super().__init__()
        self.parametrization = parametrization
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        return self.parametrization(weight) if self.on else weight


def _dense(start: WeightDelta, model: nn.Module, base: ClipBase) -> dict[str, Tensor]:
    try:
        return dense_delta(start, model)
    except KeyError as error:
        raise AdapterError(
            f"The incumbent changes {error}, which base {base.name!r} does not have.", OTHER_BASE
        ) from None


def chosen_parameters(base: ClipBase, model: nn.Module, recipe: Recipe, selects: Selects) -> list[str]:
    """Names of the parameters that learn, for an adapter kind that works on whole weights. If only a tower's last
    blocks learn, what precedes its blocks (stems, embeddings) does not. Raises ConfigError if no parameter would learn.
    """
    if selects == "layers":
        modules = dict(model.named_modules())
        return [name for layer in clip_layers(base, model, recipe) for name in _weights(layer, modules[layer])]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    norms = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
    wanted: dict[Which, Tower] = {"image": recipe.image, "text": recipe.text}
    chosen: list[str] = []
    for which, tower in wanted.items():
        blocks, count = tower_blocks(model, which)
        names = [
            name
            for name, _ in model.named_parameters()
            if tower_of(name) == which
            and (selects == "all" or (name.endswith("bias") if selects == "biases" else _layer_of(name) in norms))
            and (tower.blocks is None or order[_layer_of(name)] > order.get(blocks, 0))
        ]
        chosen += late_layers(names, which, tower, blocks, count, recipe)
    return chosen_names(chosen, recipe, base.name)


def _weights(layer: str, module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        return [f"{layer}.in_proj_weight", f"{layer}.out_proj.weight"]
    return [f"{layer}.weight"]


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def dense_delta(delta: WeightDelta, model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every parameter that a delta changes, by parameter name, float64 in the parameter's shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    dense: dict[str, Tensor] = {}
    for name, part in delta.items():
        parameter = parameter_of(name, modules) if isinstance(part, LowRank) else name
        times = OUT_PROJ_TIMES if name.endswith(INNER_OUT_PROJ) else 1.0
        value = times * part.dense().reshape(shapes[parameter]) if isinstance(part, LowRank) else part.value
        dense[parameter] = dense[parameter] + value if parameter in dense else value
    return dense
