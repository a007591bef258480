"""The shipped bases and their demo data. `ratchet up` finds the functions by entry points of ``ratchet.bases``."""

from __future__ import annotations

from collections.abc import Sequence

from core.progress import step
from core.settings import Settings
from core.settings.serving import SHIPPED, SHIPPED_VLM
from demo.data import QUESTIONS, DemoData, Preparation
from serving.engines.clip_base import list_bases
from updater.bases import REFERENCE, VLM_REFERENCE
from updater.gate.suites import load_suites


def make_clip_ready(settings: Settings) -> None:
    """Build the base "shipped" and prepare its data where missing. Raises RatchetError."""
    make_clip(settings)
    _prepare(clip_data(settings), settings)


def make_vlm_ready(settings: Settings) -> None:
    """Build the base "shipped-vlm" and prepare its data where missing. Raises RatchetError."""
    make_vlm(settings)
    _prepare(vlm_data(settings), settings)


def make_clip(settings: Settings) -> None:
    """Build the base "shipped" if it is configured and missing. Raises RatchetError."""
    from demo.clip import build_base  # PyTorch takes seconds

    if settings.base.clip == SHIPPED and SHIPPED not in list_bases(settings.home, "clip"):
        with step("building the shipped base"):
            build_base(settings.home)


def make_vlm(settings: Settings) -> None:
    """Build the base "shipped-vlm" if it is configured and missing. Raises RatchetError."""
    from demo.vlm import build_vlm  # PyTorch takes seconds

    if settings.base.vlm == SHIPPED_VLM and SHIPPED_VLM not in list_bases(settings.home, "vlm"):
        build_vlm(settings.home)


def clip_data(settings: Settings) -> list[DemoData]:
    """Reference pool and suite data of the shipped CLIP; of domains only used by suites, just their split."""
    if settings.base.clip != SHIPPED:
        return []
    pool: Sequence[str] = () if settings.updater.reference else REFERENCE
    return [*map(DemoData, pool), *(each for each in _suite_data(settings) if each.name not in QUESTIONS)]


def vlm_data(settings: Settings) -> list[DemoData]:
    if settings.base.vlm != SHIPPED_VLM:
        return []
    return [*map(DemoData, VLM_REFERENCE), *(each for each in _suite_data(settings) if each.name in QUESTIONS)]


def _suite_data(settings: Settings) -> list[DemoData]:
    """Demo data of the built-in suites; none if the operator named suites."""
    if settings.gate.suites:
        return []
    data = (settings.home / "data").resolve()
    suites = load_suites([], settings.home)
    return [DemoData(each.folder.name, each.split) for each in suites if each.folder.resolve().parent == data]


def _prepare(wanted: list[DemoData], settings: Settings) -> None:
    with Preparation(wanted, settings.home) as data:
        data.wait_for_all()
