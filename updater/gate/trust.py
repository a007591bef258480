"""Tests by source whether the base agrees with the held-out labels of new domains. Held-out samples of a domain come
from the producers of its training samples: what one of them labels wrongly throughout is learned, and counts as a gain.
Only the base did not learn from it. Labels on which it scores no higher than guessing are wrong, or of a domain that it
does not know; an operator who looks at them can tell which, and names the source in `gate.trusted_sources`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from core.settings.updates import Gate as GateSettings
from streams.records.signatures import AUDIT
from updater.gate.decision import Scores, percent
from updater.gate.statistics import Comparison, Floats, compare_clusters, holm, stratified
from updater.gate.suite_items import Item
from updater.gate.suites import Suite
from updater.gate.verdict import PooledGain, SourceAgreement

ANY = "*"
FEW = 0.1
"""Largest share of a domain's independent items that may go untested because they are too few for a test."""
Chance = Callable[[Suite, Sequence[Item]], float]
"""Score of guessing for some items of a suite."""


def agreement(
    hits: Floats, chance: float, clusters: NDArray[np.int_] | None, level: float, *, tests: int = 1, seed: int = 0
) -> Comparison:
    """Compare answers with guessing; `p_superior` is of H0: they are right no more often. ``hits`` [n, views];
    ``clusters``, ``level``, ``tests`` and ``seed`` as in :func:`compare_clusters`."""
    return compare_clusters(np.full_like(hits, chance), hits, clusters, margin=0.0, level=level, tests=tests, seed=seed)


def p_lower(own: Comparison, others: Comparison) -> float:
    """p of H0: `own` exceeds chance by at least as much as `others`. The two have different items and seeds."""
    boot = own.resample()
    opposite = replace(boot, difference=-boot.difference, moves=-boot.moves)
    return stratified([others.resample(), opposite], [1.0, 1.0]).p_above(0.0)


def judge_sources(
    scores: Sequence[Scores], chance: Chance, settings: GateSettings, candidate: str
) -> tuple[SourceAgreement, ...]:
    """Test each source with at least half of `gate.min_items` independent items in a domain, and the smaller ones
    together. Gain suites over folders are the operator's own, and are not tested."""
    fresh = [each for each in scores if each.suite.role == "gain" and not each.suite.data]
    return tuple(found for each in fresh for found in _in_domain(each, chance, settings, candidate))


def _in_domain(scores: Scores, chance: Chance, settings: GateSettings, candidate: str) -> list[SourceAgreement]:
    suite, items, hits = scores.suite, scores.suite.items(), scores.base.hits
    clusters = np.arange(len(items)) if scores.clusters is None else scores.clusters
    origins = np.array([item.origin for item in items], dtype=np.str_)
    groups = _groups(origins, clusters, settings)

    def tested(where: NDArray[np.bool_], side: str) -> tuple[Comparison, float]:
        guessed = chance(suite, [items[i] for i in np.flatnonzero(where)])
        seed = zlib.crc32(f"{suite.name} {side}".encode())
        test = partial(agreement, level=settings.alpha, tests=len(groups), seed=seed)
        return test(hits[where], guessed, clusters[where]), guessed

    found = []
    for names, trusted in groups:
        where = np.isin(origins, names)
        own, guessed = tested(where, "own")
        others = None if where.all() else tested(~where, "others")[0]
        enough = own.units >= settings.min_items / 2 or own.units > FEW * len(np.unique(clusters))
        row = SourceAgreement(
            suite=suite.name,
            source=names[0] if len(names) == 1 else "",
            sources=len(names),
            n=own.n,
            units=own.units,
            base=own.after,
            chance=guessed,
            p=own.p_superior,
            trusted=trusted,
            others=None if others is None else others.after,
            p_others=1.0 if others is None else p_lower(own, others),
        )
        doubted = not trusted and enough and row.p > settings.alpha
        found.append(replace(row, reason=_reason(row, candidate) if doubted else ""))
    lower = holm([row.p_others for row in found], settings.alpha)
    return [replace(row, lower=shown) for row, (shown, _) in zip(found, lower, strict=True)]


def _groups(
    origins: NDArray[np.str_], clusters: NDArray[np.int_], settings: GateSettings
) -> list[tuple[list[str], bool]]:
    """Names that are tested together, and whether they are trusted."""
    names, index = np.unique(origins, return_inverse=True)
    pairs = np.unique(np.stack([index, clusters], axis=1), axis=0)
    units = dict(zip(names.tolist(), np.bincount(pairs[:, 0]).tolist(), strict=True))
    trusted = {name for name in units if {name, ANY} & {AUDIT, *settings.trusted_sources}}
    groups = []
    for trust in (False, True):
        own = [name for name in units if (name in trusted) == trust]
        small = [name for name in own if units[name] < settings.min_items / 2]
        groups += [([name], trust) for name in own if name not in small]
        groups += [(small, trust)] if small else []
    return groups


def _maker(row: SourceAgreement) -> str:
    if row.sources > 1:
        return f"{row.sources} sources with few samples"
    return f"the source {row.source!r}" if row.source else "samples that name no source"


def _reason(row: SourceAgreement, candidate: str) -> str:
    named = "name the source" if row.sources == 1 else "name the sources"
    return (
        f"{row.suite}: the base is not shown to agree with the labels of {_maker(row)} more than by chance "
        f"({percent(row.base)} right, {percent(row.chance)} by chance): it cannot tell a new domain from wrong labels; "
        f"look at the samples, then {named} in gate.trusted_sources, or release {candidate} with "
        f"`ratchet releases create --{candidate.partition('-')[0]} {candidate} --force`"
    )


def trust_warnings(rows: Sequence[SourceAgreement], gain: PooledGain | None) -> list[str]:
    """Sources that the base agrees with less than with others of the domain, and a gain shown on one source alone."""
    found = [
        f"{row.suite}: the base agrees with the labels of {_maker(row)} less than with those of other sources "
        f"({percent(row.base)} right, of the others {percent(row.others)})"
        for row in rows
        if row.lower and not row.trusted and row.others is not None
    ]
    shown = gain is not None and gain.decision == "passed" and gain.n == sum(row.n for row in rows)
    if shown and len({row.source for row in rows}) == 1 and all(row.sources == 1 and not row.trusted for row in rows):
        found.append(
            f"all {sum(row.n for row in rows)} held-out items come from {_maker(rows[0])}: "
            "a mistake that it makes everywhere would count as a gain"
        )
    return found
