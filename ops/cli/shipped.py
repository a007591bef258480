"""What a first start on one machine needs: the shipped bases, and the data that their gates and trainers use."""

from __future__ import annotations

from ops.errors import RatchetError
from ops.progress import step
from ops.settings import Settings

CLIP, VLM = "shipped", "shipped-vlm"


def make_ready(settings: Settings) -> None:
    """Build the shipped bases and prepare their data where they are missing.

    Another base is only checked: its suites and its reference pool are the operator's to choose. An empty
    ``base.vlm`` is none, and needs nothing.

    Raises:
        RatchetError: a base is not registered.
    """
    from streams.demo import QUESTIONS, prepare_domain, prepare_questions
    from updater.base import REFERENCE
    from updater.base.vlm import VLM_REFERENCE

    make_base_ready(settings)
    wanted = set(suite_domains(settings))
    if settings.base.clip == CLIP:
        domains = {name for name in wanted if name not in QUESTIONS}
        for domain in sorted({*domains, *([] if settings.updater.reference else REFERENCE)}):
            prepare_domain(domain, settings.home)
    if settings.base.vlm == VLM:
        for name in sorted({*wanted & QUESTIONS.keys(), *VLM_REFERENCE}):
            prepare_questions(name, settings.home)


def make_base_ready(settings: Settings) -> None:
    """Build the shipped bases that are missing. Raises RatchetError when another base is not registered."""
    from serving.engines.clip_base import list_bases

    if settings.base.clip not in list_bases(settings.home, "clip"):
        _only_shipped(settings.base.clip, CLIP, "--model ...")
        from updater.base import build_base

        with step("building the shipped base"):
            build_base(settings.home)
    if settings.base.vlm and settings.base.vlm not in list_bases(settings.home, "vlm"):
        _only_shipped(settings.base.vlm, VLM, "--family vlm --model ...")
        from updater.base.vlm import build_vlm

        build_vlm(settings.home)


def _only_shipped(name: str, shipped: str, options: str) -> None:
    if name != shipped:
        raise RatchetError(
            f"base {name!r} is not registered.",
            f"Run `ratchet base add {name} {options}` first.",
        )


def suite_domains(settings: Settings) -> list[str]:
    """The demo data that the built-in suites ask about; none when the operator named suites."""
    from updater.gate import load_suites

    if settings.gate.suites:
        return []
    data = (settings.home / "data").resolve()
    return sorted(
        {suite.folder.name for suite in load_suites([], settings.home) if suite.folder.resolve().parent == data}
    )
