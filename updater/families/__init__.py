"""Differences between the two model families that are updated: a CLIP learns from image-text pairs, a VLM from
questions about images with their answers. A recipe names its family."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import SHIPPED_VLM
from serving.engines.adapters import read_adapter
from serving.engines.clip_base import ClipBase, list_bases, load_base
from serving.engines.lora import merge
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from streams.publish.folders import read_folder
from updater.adapters import WeightDelta
from updater.bases import VLM_REFERENCE, reference_folders, shipped_folders
from updater.data.pools import check_reference
from updater.families.clip_learner import ClipLearner
from updater.families.vlm_learner import VlmLearner
from updater.recipes import Family, Recipe, load_recipe
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


def families_with_a_base(settings: Settings) -> tuple[Family, ...]:
    vlm = settings.base.vlm and settings.base.vlm in list_bases(settings.home, "vlm")
    return ("clip", "vlm") if vlm else ("clip",)


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


def family_recipe(settings: Settings, family: Family) -> Recipe:
    """Recipe that the settings name for a family. Raises ConfigError if it is of the other one."""
    setting = "vlm_recipe" if family == "vlm" else "recipe"
    recipe = load_recipe(getattr(settings.updater, setting))
    if recipe.family != family:
        raise ConfigError(
            f"updater.{setting} is {recipe.name!r}, which trains a {recipe.family.upper()}.",
            f"Name a recipe with `family: {family}` there.",
        )
    return recipe


def reference_of(settings: Settings, family: Family) -> list[Path]:
    """Folder datasets of a family's reference pool: ``updater.reference``, or those of the shipped base. For a VLM only
    folders with questions count."""
    if family == "clip":
        return reference_folders(settings)
    check_reference(settings.updater.reference)
    asking = [
        folder for folder in settings.updater.reference if any(item.question for item in read_folder(folder, "train"))
    ]
    return asking or shipped_folders(settings, settings.base.vlm == SHIPPED_VLM, VLM_REFERENCE)


def need_reference(settings: Settings, recipe: Recipe) -> None:
    """Raise ConfigError if a recipe trains on reference examples, and there are none or a folder of them is missing."""
    if recipe.mixture.reference == 0:
        return
    folders = reference_of(settings, recipe.family)
    check_reference(folders)
    if not folders:
        raise ConfigError(
            f"there is no reference pool to hold the {recipe.family.upper()} in place.",
            "Name folder datasets in updater.reference (`ratchet init` makes one of your pictures), or a recipe that "
            "uses none.",
        )


def spaces_of(base: Base, adapter: Path) -> tuple[str, str]:
    """Image space and text space of an adapter directory; empty for a VLM, which has none."""
    if isinstance(base, VlmBase):
        return "", ""
    spaces = base.spaces_with(
        {changed.name: changed.digest for changed in merge(read_adapter(adapter), base.build_model())}
    )
    return spaces.image, spaces.text
