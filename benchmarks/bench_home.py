"""A new home with bases for one run of a benchmark."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.random_base import random_base
from core.settings import Settings
from core.settings.serving import SHIPPED
from demo.clip import build_base
from serving.engines.clip_base import ClipBase, list_bases, load_base


def cache_folder(settings: Settings) -> Path:
    return settings.home.resolve() / "cache" / "bench"


def clip_base(settings: Settings, name: str) -> ClipBase:
    """A registered base, the shipped one built where missing, or an architecture of open_clip with random weights.
    Raises ConfigError."""
    if name == SHIPPED:
        return build_base(settings.home)
    if name in list_bases(settings.home, "clip"):
        return load_base(settings.home, name)
    return random_base(cache_folder(settings), name)


def without_vlm(settings: Settings) -> Settings:
    return settings.model_copy(update={"base": settings.base.model_copy(update={"vlm": ""})})


def bench_home(settings: Settings, home: Path, clip: ClipBase, **serve: Any) -> Settings:
    """Settings of a new home: its CLIP is ``clip``, its VLM the settings' one if that is registered.

    The guard is off: it would roll back random adapters and so end a measurement. ``serve``: fields of
    ``settings.serve`` to change.
    """
    shutil.copytree(clip.directory, home / "bases" / clip.name)
    vlm = settings.home / "bases" / settings.base.vlm
    if settings.base.vlm and vlm.is_dir():
        shutil.copytree(vlm, home / "bases" / settings.base.vlm)
    return settings.model_copy(
        update={
            "home": home, "ledger_url": None, "artifacts_url": None, "lake_url": None,
            "base": settings.base.model_copy(update={"clip": clip.name}),
            "serve": settings.serve.model_copy(update=serve),
            "rollout": settings.rollout.model_copy(update={"guard_seconds": 0.0}),
        }
    )  # fmt: skip
