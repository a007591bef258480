"""A base in training, whatever kind of adapter learns: the same module is student and teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serving.engines.adapters import PREFIX, write_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters.weight_deltas import Dense, LowRank, WeightDelta, compress

OTHER_BASE = "It belongs to another base: release the base alone, and update from there."


class AdapterModel(ABC):
    """The model that a learner trains. ``parameters`` are what the optimizer moves, by name."""

    frozen: ClipBase | VlmBase
    model: nn.Module
    device: torch.device
    rank: int
    alpha: float
    parameters: dict[str, nn.Parameter]

    @property
    @abstractmethod
    def base_names(self) -> list[str]:
        """Every layer that differs from the base or may differ later, by its name in the base."""

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Switch the adapter off inside the context: the model is the base alone."""

    @abstractmethod
    def delta(self) -> dict[str, LowRank | Dense]:
        """Current difference to the base."""

    @abstractmethod
    def write(self, delta: WeightDelta, directory: Path) -> str:
        """Write ``delta`` as an adapter directory, compressed to the rank; returns the adapter's name."""

    @property
    def replaced(self) -> list[nn.Module]:
        """Modules that form a whole weight in place of a base parameter; their memory counts once."""
        return []

    def stepped(self, step: int, steps: int) -> None:  # noqa: B027 - most have nothing to do then
        """Called after each step of the optimizer."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore what :meth:`state` returned."""

    def restore(self) -> None:  # noqa: B027
        """Undo what a pass left behind in frozen weights."""

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the parameters these values inside the context: an earlier student, as a teacher."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = values[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
            self.restore()


class WholeWeights:
    """Whole parameters that an incumbent replaced; active except when the base alone is asked for."""

    def __init__(self, model: nn.Module, delta: WeightDelta) -> None:
        self._own: list[tuple[nn.Module, str, nn.Parameter, Tensor, Tensor]] = []
        self.delta: dict[str, LowRank | Dense] = {}
        for name, part in delta.items():
            if isinstance(part, Dense):
                owner, _, leaf = name.rpartition(".")
                module, parameter = model.get_submodule(owner), model.get_parameter(name)
                plain = parameter.detach().clone()
                self._own.append((module, leaf, parameter, plain, applied(plain, part)))
                self.delta[name] = part
        self.use(True)

    def use(self, on: bool) -> None:
        for module, leaf, parameter, plain, replaced in self._own:
            # PEFT gives attention a new parameter at every pass; a parametrization takes the old one along.
            current = module._parameters.get(leaf)
            (parameter if current is None else current).data.copy_(replaced if on else plain)


def applied(plain: Tensor, part: Dense) -> Tensor:
    """Value of a parameter with a whole difference; exact if the difference was taken between float32 values."""
    return (plain.double().cpu() + part.value).to(plain.device, plain.dtype)


def plain_name(name: str) -> str:
    """Layer name in the base, from PEFT's (which goes through ``base_layer`` inside attention)."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def parameter_of(layer: str, modules: Mapping[str, nn.Module]) -> str:
    """Parameter that a factor changes, from the layer name in PEFT's spelling."""
    plain = plain_name(layer)
    return f"{plain}.in_proj_weight" if isinstance(modules[plain], nn.MultiheadAttention) else f"{plain}.weight"


def write_delta(
    frozen: ClipBase | VlmBase,
    delta: WeightDelta,
    directory: Path,
    *,
    rank: int,
    alpha: float,
    config: Mapping[str, Any],
    unchanged: WeightDelta,
) -> str:
    """Write a delta as an adapter directory, factors compressed to the rank; returns the adapter's name. Parts in
    ``unchanged`` with the same rank are written bit by bit: a locked tower keeps its embedding space, and with it every
    search index."""
    model = frozen.build_model()
    scale = alpha / rank
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for name, part in sorted(delta.items()):
        if isinstance(part, Dense):
            tensors[f"{PREFIX}{name}"] = applied(parameters[name], part)
            continue
        known = unchanged.get(name)
        small = known if isinstance(known, LowRank) and known.rank == rank else compress(part, rank)
        shape = parameters[parameter_of(name, modules)].shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = small.a.reshape(rank, *shape[1:]).float()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (
            (small.b / scale).reshape(shape[0], rank, *[1] * (len(shape) - 2)).float()
        )
    return write_adapter(directory, tensors, config, frozen)
