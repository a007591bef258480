"""Bases (:mod:`updater.bases.register`), and the reference data of shipped ones, used if the operator names no pool."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from core.settings import Settings
from core.settings.serving import SHIPPED

REFERENCE: Final = ("noto", "pixel_ultica")
"""The two training domains of the shipped CLIP with the best texts."""
VLM_REFERENCE: Final = ("vqa_base",)


def reference_folders(settings: Settings) -> list[Path]:
    """Folder datasets of CLIP's reference pool: ``updater.reference``, or those of the shipped base."""
    return settings.updater.reference or shipped_folders(settings, settings.base.clip == SHIPPED, REFERENCE)


def shipped_folders(settings: Settings, is_shipped: bool, names: tuple[str, ...]) -> list[Path]:
    folders = [settings.home / "data" / name for name in names if is_shipped]
    return [folder for folder in folders if folder.is_dir()]
