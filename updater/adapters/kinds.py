"""Adapter kinds: what learns in the layers of a CLIP. The shipped recipes use LoRA; packages can add kinds
(:mod:`updater.recipes.plugin_registry`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from torch import nn

from serving.engines.clip_base import ClipBase
from updater.adapters.lora import LoraModel
from updater.adapters.model import AdapterModel
from updater.adapters.trained_layers import clip_layers, low_rank_layers
from updater.adapters.weight_deltas import WeightDelta
from updater.recipes import Recipe
from updater.recipes.plugin_registry import Methods


class AdapterKind(ABC):
    whole: ClassVar[bool] = False
    """True if its parameters are differences of whole weights, which mean the same in the next update, not factors."""

    @classmethod
    @abstractmethod
    def build(
        cls, base: ClipBase, plain: nn.Module, recipe: Recipe, start: WeightDelta, seed: int, device: str
    ) -> tuple[list[str], AdapterModel]:
        """Return the names of the layers or parameters that learn, and the model to train. ``plain``: the base's own
        model. ``start``: the delta to begin with."""


class Lora(AdapterKind):
    @classmethod
    def build(
        cls, base: ClipBase, plain: nn.Module, recipe: Recipe, start: WeightDelta, seed: int, device: str
    ) -> tuple[list[str], AdapterModel]:
        layers = low_rank_layers(clip_layers(base, plain, recipe), recipe, base.name)
        return layers, LoraModel(base, layers, recipe.rank, recipe.alpha, start, seed, device)


KINDS: Final[Methods[type[AdapterKind]]] = Methods("adapters", "adapter kind", {"lora": Lora}, AdapterKind)
