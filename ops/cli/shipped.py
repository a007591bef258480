"""What a first start on one machine needs: the shipped bases, and the data that their gates and trainers use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import RatchetError
from core.progress import step
from core.settings import Settings
from core.settings.serving import SHIPPED, SHIPPED_VLM

if TYPE_CHECKING:
    from demo.data import DemoData


def make_ready(settings: Settings) -> None:
    """Build the shipped bases and prepare their data where they are missing.

    Another base is only checked: its suites and its reference pool are the operator's to choose. An empty
    ``base.vlm`` is none, and needs nothing.

    Raises:
        RatchetError: a base is not registered.
    """
    from demo.data import Preparation

    make_base_ready(settings)
    with Preparation(needed_data(settings), settings.home) as data:
        data.wait_for_all()


def needed_data(settings: Settings) -> list[DemoData]:
    """What gate and trainer use of the demo data: of a domain that only suites ask about, their split."""
    from demo.data import QUESTIONS, DemoData
    from updater.bases import REFERENCE, VLM_REFERENCE

    suites = suite_data(settings)
    needed = []
    if settings.base.clip == SHIPPED:
        needed += [DemoData(name) for name in ([] if settings.updater.reference else REFERENCE)]
        needed += [each for each in suites if each.name not in QUESTIONS]
    if settings.base.vlm == SHIPPED_VLM:
        needed += [DemoData(name) for name in VLM_REFERENCE]
        needed += [each for each in suites if each.name in QUESTIONS]
    return needed


def make_base_ready(settings: Settings) -> None:
    """Build the shipped bases that are missing. Raises RatchetError when another base is not registered."""
    from serving.engines.clip_base import list_bases

    if settings.base.clip not in list_bases(settings.home, "clip"):
        _only_shipped(settings.base.clip, SHIPPED, "--model ...")
        from demo.clip import build_base

        with step("building the shipped base"):
            build_base(settings.home)
    if settings.base.vlm and settings.base.vlm not in list_bases(settings.home, "vlm"):
        _only_shipped(settings.base.vlm, SHIPPED_VLM, "--family vlm --model ...")
        from demo.vlm import build_vlm

        build_vlm(settings.home)


def _only_shipped(name: str, shipped: str, options: str) -> None:
    if name != shipped:
        raise RatchetError(
            f"base {name!r} is not registered.",
            f"Run `ratchet base add {name} {options}` first.",
        )


def suite_data(settings: Settings) -> list[DemoData]:
    """The demo data that the built-in suites ask about; none when the operator named suites."""
    from demo.data import DemoData
    from updater.gate.suites import load_suites

    if settings.gate.suites:
        return []
    data = (settings.home / "data").resolve()
    suites = load_suites([], settings.home)
    return [DemoData(each.folder.name, each.split) for each in suites if each.folder.resolve().parent == data]
