"""Differences between the two model families that are updated: a CLIP learns from image-text pairs, a VLM from
questions about images with their answers. A recipe names its family."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from core.errors import ConfigError
from core.settings import Settings
from serving.engines.adapters import read_adapter
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.lora import merge
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from updater.adapters import WeightDelta
from updater.families.clip_learner import ClipLearner
from updater.families.vlm_learner import VlmLearner
from updater.recipes import Family, Recipe
from updater.step.learner import AnyLearner, Base

FAMILIES: tuple[Family, ...] = get_args(Family)


def make_learner(base: Base, recipe: Recipe, start: WeightDelta, seed: int, device: str = "cpu") -> AnyLearner:
    """Create the learner of a base. Raises ConfigError if the recipe is of another family."""
    if recipe.family == "clip" and isinstance(base, ClipBase):
        return ClipLearner(base, recipe, start, seed, device)
    if recipe.family == "vlm" and isinstance(base, VlmBase):
        return VlmLearner(base, recipe, start, seed, device)
    raise ConfigError(
        f"recipe {recipe.name!r} trains a {recipe.family.upper()}, and base {base.name!r} is a {base.family.upper()}.",
        "Choose a recipe of the base's family.",
    )


def family_base(settings: Settings, family: Family) -> Base:
    """Base that a family's adapters belong to. Raises BaseModelError if it is not registered, ConfigError if none is
    set."""
    if family == "clip":
        return load_base(settings.home, settings.base.clip)
    if not settings.base.vlm:
        raise ConfigError(
            "base.vlm is empty: there is no VLM to update.", "Name a registered VLM (`ratchet base list`)."
        )
    return load_vlm_base(settings.home, settings.base.vlm)


def spaces_of(base: Base, adapter: Path) -> tuple[str, str]:
    """Image space and text space of an adapter directory; empty for a VLM, which has none."""
    if isinstance(base, VlmBase):
        return "", ""
    spaces = base.spaces_with(
        {changed.name: changed.digest for changed in merge(read_adapter(adapter), base.build_model())}
    )
    return spaces.image, spaces.text
