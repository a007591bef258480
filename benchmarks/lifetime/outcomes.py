"""Results of real updates on real items: the outcomes that `ratchet bench gate` stored, suite by suite."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.gate.plans import BAD, CHAIN, GOOD, NEW, plans
from benchmarks.gate.stock import ARCHIVE, Ranks, read_trials
from benchmarks.gate.trial import fresh_name
from core.errors import ConfigError
from updater.gate.suites import Suite, load_suites

MOST_CANDIDATES = 150


@dataclass(frozen=True, slots=True)
class Source:
    """One suite's items under the base, and how updates moved ranks on them."""

    suite: Suite
    base: Ranks
    before: Ranks
    """Under the incumbent, for each item and each good candidate that was asked the suite."""
    after: Ranks
    """The same under the candidate."""


def read_sources(place: Path = ARCHIVE) -> dict[str, Source]:
    """Sources by suite name: all retention suites, and one for each new domain. Only candidates that were meant to be
    good count. ``place``: the archive, or the folder into which `ratchet bench gate` writes outcomes. Raises
    ConfigError if there is nothing, or it has hits without ranks.
    """
    trials = dict(read_trials(place))
    if "base" not in trials:
        raise ConfigError(f"{place} holds no outcomes of the base.", "Run `ratchet bench gate`, and name its folder.")
    base = trials["base"]
    if any(array.dtype == np.uint8 for array in base.values()):
        raise ConfigError(
            f"{place} holds hits alone: it was written by an earlier version.",
            "Run `ratchet bench gate`, which keeps ranks, and name its folder with --outcomes.",
        )
    pairs: dict[str, list[tuple[Ranks, Ranks]]] = defaultdict(list)
    for candidate, incumbent, domain in good_plans():
        before, after = trials.get(incumbent or "base"), trials.get(candidate)
        if before and after:
            wanted = {fresh_name(domain), *(name for name in after if not name.startswith(fresh_name("")))}
            for name in wanted & after.keys():
                pairs[name].append((before[name], after[name]))
    suites = [suite for suite in load_suites([], None, "clip") if suite.role == "retention"]
    suites += [Suite(name=fresh_name(domain), role="gain", task="retrieval", data="-") for domain in NEW]
    missing = [suite.name for suite in suites if suite.name not in pairs]
    if missing:
        raise ConfigError(f"{place} has no good candidate for {', '.join(missing)}.", "Run `ratchet bench gate`.")
    return {suite.name: _source(suite, base[suite.name], pairs[suite.name]) for suite in suites}


@lru_cache(maxsize=1)
def good_plans() -> list[tuple[str, str, str]]:
    fewest = CHAIN + len(BAD)
    return [(p.name, p.incumbent, p.domain) for p in plans(fewest, MOST_CANDIDATES) if p.kind in GOOD]


def _source(suite: Suite, base: Ranks, pairs: list[tuple[Ranks, Ranks]]) -> Source:
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return Source(suite, base, before, after)
