"""What a first start on one machine needs: the shipped base, and the data that its gate and its trainer use."""

from __future__ import annotations

from ops.errors import RatchetError
from ops.progress import step
from ops.settings import Settings


def make_ready(settings: Settings) -> None:
    """Build the shipped base and prepare its data where they are missing.

    Another base is only checked: its suites and its reference pool are the operator's to choose.

    Raises:
        RatchetError: the base is not registered.
    """
    from streams.demo import prepare_domain
    from updater.base import REFERENCE

    make_base_ready(settings)
    if settings.base.clip == "shipped":
        wanted = {*suite_domains(settings), *([] if settings.updater.reference else REFERENCE)}
        for domain in sorted(wanted):
            prepare_domain(domain, settings.home)


def make_base_ready(settings: Settings) -> None:
    """Build the shipped base if it is missing. Raises RatchetError when another base is not registered."""
    from serving.engines.base import list_bases

    if settings.base.clip in list_bases(settings.home):
        return
    if settings.base.clip != "shipped":
        raise RatchetError(
            f"base {settings.base.clip!r} is not registered.",
            f"Run `ratchet base add {settings.base.clip} --model ...` first.",
        )
    from updater.base import build_base

    with step("building the shipped base"):
        build_base(settings.home)


def suite_domains(settings: Settings) -> list[str]:
    """The demo domains that the built-in suites ask about; none when the operator named suites."""
    from updater.gate import load_suites

    if settings.gate.suites:
        return []
    data = (settings.home / "data").resolve()
    return sorted(
        {suite.folder.name for suite in load_suites([], settings.home) if suite.folder.resolve().parent == data}
    )
