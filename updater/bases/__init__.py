"""Bases: where they come from (:mod:`updater.bases.register`), and the data that a shipped one knows.

An update is held to those where the operator names no reference pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from core.settings import Settings
from core.settings.serving import SHIPPED

REFERENCE: Final = ("noto", "pixel_ultica")
"""Of the domains that the shipped CLIP was trained on, the two with the best texts."""
VLM_REFERENCE: Final = ("vqa_base",)
"""The questions that the shipped VLM was trained on."""


def reference_folders(settings: Settings) -> list[Path]:
    """Folder datasets of CLIP's reference pool: ``updater.reference``, or those of the shipped base."""
    return settings.updater.reference or shipped_folders(settings, settings.base.clip == SHIPPED, REFERENCE)


def shipped_folders(settings: Settings, is_shipped: bool, names: tuple[str, ...]) -> list[Path]:
    """Those of the prepared folders that are there; none for another base."""
    folders = [settings.home / "data" / name for name in names if is_shipped]
    return [folder for folder in folders if folder.is_dir()]
