"""Which adapters may still be needed, whatever their age, and by what."""

from __future__ import annotations

from collections.abc import Iterator

from core.ledger import Family, Ledger, VerdictRow
from core.settings import Settings
from serving.releases.residency import read_residency
from updater.gate.sample_suites import PREFIX as MEMORY
from updater.gate.sample_suites import best_by_suite

FRESH = "fresh"


def needed_adapters(ledger: Ledger, settings: Settings) -> dict[str, str]:
    """Adapters that must stay, each with one reason: what answers, what a rollback or a switch of the base goes back
    to, what the gate compares with, what is not decided.
    """
    needed: dict[str, str] = {}
    for name, reason in _reasons(ledger, settings):
        if name is not None:
            needed.setdefault(name, reason)
    return needed


def _reasons(ledger: Ledger, settings: Settings) -> Iterator[tuple[str | None, str]]:
    yield from ledger.adapters_in_use().items()
    bases = ledger.released_bases()
    for base in {None, *bases}:
        yield from _resident(ledger, settings, base)
    for row in ledger.newest_of_each_base():
        yield row.clip, f"release {row.number} is the newest of its base"
    for base in ledger.upgrade_bases():
        upgrade = ledger.approved_upgrade(base)
        if upgrade is not None:
            yield ledger.update(upgrade.update_id).adapter, f"{upgrade.update_id} may be switched to"
    for family in ("clip", "vlm"):
        for update in ledger.updates(1, family):
            yield update.adapter, f"{update.id} is the newest of its family, and may be judged again"
    for name in settings.gc.keep_adapters:
        yield name, "gc.keep_adapters names it"


def _resident(ledger: Ledger, settings: Settings, base: str | None) -> Iterator[tuple[str | None, str]]:
    """What answers and what a rollback goes back to, with releases of one base; None: of all."""
    size = max(settings.gc.keep_releases, settings.serve.rollback_window)
    rows = read_residency(ledger, size, base)
    for row in rows.answering:
        yield from ((name, f"release {row.number} answers") for name in (row.clip, row.vlm))
    for row in rows.window:
        yield from ((name, f"release {row.number} is one of the newest") for name in (row.clip, row.vlm))
    live = ledger.live()
    stable = None if live is None else ledger.incumbent(live.number + 1, base)
    if stable is None:
        return
    families: tuple[Family, ...] = ("clip", "vlm")
    for family in families:
        before = ledger.before(family, stable.adapter(family), base)
        if before is not None:
            yield before.adapter(family), f"a rollback of release {stable.number} goes back to it"
    yield from ((name, "replicas keep it for a rollback") for name in (*rows.clips, *rows.vlms))


def best_adapters(ledger: Ledger, family: str, base: str) -> dict[str, str]:
    """Released adapters of a base with the highest score on any suite, which candidates are compared with."""
    verdicts = ledger.released_verdicts(family, base)
    suites = _suites(verdicts)
    best: dict[str, str] = {}
    for suite in sorted(suites):
        for name in best_by_suite(verdicts, [suite], None).values():
            best.setdefault(name, f"best release on {suite}")
    return best


def _suites(verdicts: list[VerdictRow]) -> set[str]:
    """Names of retention suites; the fresh suite of a domain stands for its memory suite, too."""
    suites = [pair for verdict in verdicts for pair in verdict.summary.get("suites", {}).items()]
    names = {name for name, suite in suites if suite.get("role") != "gain" or name.startswith(FRESH)}
    return names | {f"{MEMORY}{name.removeprefix(FRESH)}" for name in names if name.startswith(FRESH)}
