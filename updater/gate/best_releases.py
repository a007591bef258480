"""The best release so far, suite by suite: what a candidate is compared with, so that small losses cannot add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from core.ledger import Ledger, VerdictRow
from updater.gate.sample_suites import PREFIX

MOST = 2
"""Different adapters: each is resident in the gate's engine beside incumbent and candidate."""


def best_releases(
    ledger: Ledger, family: str, base: str, suites: Sequence[str], incumbent: str | None
) -> dict[str, str]:
    """By suite the adapter that was released with the highest score in its verdict, less the base's in the same one.

    A score is compared by its distance to the base because the items of a memory suite change as data are learned. The
    incumbent is not named, as it is a reference anyway. Of more than MOST adapters those that are best on most suites
    are named.

    Args:
        base: digest of the base; adapters of another one do not compare.
        suites: names of retention suites. That of a memory suite also stands for the fresh suite of its domain, by
            which the domain was judged when it was new.
    """
    return best_by_suite(ledger.released_verdicts(family, base), suites, incumbent)


def best_by_suite(verdicts: Sequence[VerdictRow], suites: Sequence[str], incumbent: str | None) -> dict[str, str]:
    """:func:`best_releases` among released verdicts, the newest first."""
    best: dict[str, str] = {}
    for name in suites:
        scored = [(score, verdict.adapter) for verdict in verdicts if (score := _score(verdict, name)) is not None]
        if scored:  # the newest first: of equal ones it is taken
            best[name] = max(scored, key=lambda pair: pair[0])[1]
    best = {name: adapter for name, adapter in best.items() if adapter != incumbent}
    named = {adapter for adapter, _ in Counter(best.values()).most_common(MOST)}
    return {name: adapter for name, adapter in best.items() if adapter in named}


def _score(verdict: VerdictRow, name: str) -> float | None:
    suites: Mapping[str, Mapping[str, Any]] = verdict.summary.get("suites", {})
    suite = suites.get(name)
    if suite is None and name.startswith(PREFIX):
        suite = suites.get(f"fresh{name.removeprefix(PREFIX)}")
    return None if suite is None else float(suite["after"]) - float(suite["base"])
