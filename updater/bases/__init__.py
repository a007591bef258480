"""Bases (:mod:`updater.bases.register`), and the reference data of shipped ones, used if the operator names no pool."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final

from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import SHIPPED, SHIPPED_VLM
from serving.engines.clip_base import list_bases
from streams.publish.folders import INDEX, read_folder
from updater.data.pools import check_reference
from updater.recipes import Family, Recipe

REFERENCE: Final = ("noto", "pixel_ultica")
"""The two training domains of the shipped CLIP with the best texts."""
VLM_REFERENCE: Final = ("vqa_base",)


def families_with_a_base(settings: Settings) -> tuple[Family, ...]:
    vlm = settings.base.vlm and settings.base.vlm in list_bases(settings.home, "vlm")
    return ("clip", "vlm") if vlm else ("clip",)


def reference_folders(settings: Settings) -> list[Path]:
    """Folder datasets of CLIP's reference pool: ``updater.reference``, or those of the shipped base."""
    return settings.updater.reference or shipped_folders(settings, settings.base.clip == SHIPPED, REFERENCE)


def shipped_folders(settings: Settings, is_shipped: bool, names: tuple[str, ...]) -> list[Path]:
    folders = [settings.home / "data" / name for name in names if is_shipped]
    return [folder for folder in folders if folder.is_dir()]


def reference_of(settings: Settings, family: Family) -> list[Path]:
    """Folder datasets of a family's reference pool: ``updater.reference``, or those of the shipped base. For a VLM only
    folders with questions count."""
    if family == "clip":
        return reference_folders(settings)
    check_reference(settings.updater.reference)
    asking = [folder for folder in settings.updater.reference if _asks(folder, _modified(folder))]
    return asking or shipped_folders(settings, settings.base.vlm == SHIPPED_VLM, VLM_REFERENCE)


def _modified(folder: Path) -> int:
    index = folder / INDEX
    return index.stat().st_mtime_ns if index.exists() else 0


@lru_cache(maxsize=64)  # the screen of `ratchet status` asks again and again
def _asks(folder: Path, modified: int) -> bool:
    return any(item.question for item in read_folder(folder, "train"))


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
