"""Adapter kinds: what learns in the layers of a CLIP that learn, and the model in which it does.

The shipped recipes use LoRA; other kinds are installed (:mod:`updater.recipes.plugin_registry`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from torch import nn

from serving.engines.clip_base import ClipBase
from updater.adapters.lora import LoraModel
from updater.adapters.model import AdapterModel
from updater.adapters.trained_layers import clip_layers
from updater.adapters.weight_deltas import WeightDelta
from updater.recipes import Recipe
from updater.recipes.plugin_registry import Methods


class AdapterKind(ABC):
    """One kind, by the name that a recipe's ``adapter.kind`` has."""

    whole: ClassVar[bool] = False
    """True if its parameters are differences of whole weights, which mean the same in the next update, and not
    factors."""

    @classmethod
    @abstractmethod
    def build(
        cls, base: ClipBase, plain: nn.Module, recipe: Recipe, start: WeightDelta, seed: int, device: str
    ) -> tuple[list[str], AdapterModel]:
        """Names of the layers or parameters that learn, and the model in which they do.

        Args:
            plain: the base's own model.
            start: the delta to begin with.
        """


class Lora(AdapterKind):
    """PEFT's LoRA, which never forms ΔW."""

    @classmethod
    def build(
        cls, base: ClipBase, plain: nn.Module, recipe: Recipe, start: WeightDelta, seed: int, device: str
    ) -> tuple[list[str], AdapterModel]:
        layers = clip_layers(base, plain, recipe)
        return layers, LoraModel(base, layers, recipe.rank, recipe.alpha, start, seed, device)


KINDS: Final[Methods[type[AdapterKind]]] = Methods("adapters", "adapter kind", {"lora": Lora}, AdapterKind)
