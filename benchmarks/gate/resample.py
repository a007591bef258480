"""The gate's verdicts on other items: draws with replacement from a candidate's outcomes on all of them.

Two kinds of outcomes are derived from real ones, so that the truth is known exactly. Under *no change* each drawn
item's two sides are swapped by a fair coin: items disagree as often as before, and the true difference is 0. *At the
margin* hits are also lost, so that the true difference is the margin: there the gate may let the suite pass with
probability at most ``level``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.cases import FEW, Answers, Case, Hits, Judged, Rule, has_ranks, hits_of, judge
from benchmarks.processes import in_processes
from updater.gate.suites import Suite

LAST_RANK = 9999
Generator = np.random.Generator
Pick = dict[str, NDArray[np.int_]]


def pick(case: Case, rng: Generator) -> Pick:
    return {s.name: rng.integers(len(case.after[s.name]), size=case.judged[s.name]) for s in case.suites}


def swapped(before: Answers, after: Answers, rng: Generator) -> tuple[Answers, Answers]:
    coin = rng.random(len(before))[:, None] < 0.5
    return np.where(coin, after, before), np.where(coin, before, after)


def lowered(after: Answers, share: float, rng: Generator) -> Answers:
    lost = after.dtype.type(LAST_RANK) if has_ranks(after) else 0.0
    return np.where(rng.random(after.shape) < share, lost, after)


def share_to_lose(before: Hits, after: Hits, margin: float) -> float:
    """Share of the hits of both sides together whose loss costs ``margin``. Raises ValueError if there is none."""
    common = float(before.mean() + after.mean()) / 2
    if common < margin:
        raise ValueError(f"a share of {common:.3f} right answers cannot lose {margin}")
    return margin / common


def unchanged(case: Case, drawn: Case, rng: Generator, edge: Suite | None = None, margin: float = 0.0) -> Case:
    """``drawn`` with the true difference of every retention suite made 0; that of suite ``edge`` becomes -margin.

    ``case`` holds the outcomes on all items. Base and incumbent are the same here: one comparison is under test.
    Without an ``edge`` the gain suites do not change either; with one they keep their gain, so that only the edge can
    fail.
    """
    before: dict[str, Answers] = {}
    after: dict[str, Answers] = {}
    for suite in drawn.suites:
        name = suite.name
        first, second = drawn.before[name], drawn.after[name]
        held = [hits_of(suite, side[name]) for side in (case.before, case.after)]
        if suite.role == "retention" or edge is None:
            first, second = swapped(first, second, rng)
        if edge is not None and name == edge.name:
            second = lowered(second, share_to_lose(held[0], held[1], margin), rng)
        before[name], after[name] = first, second
    return replace(drawn, base=before, before=before, after=after)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The verdict on one drawn item set."""

    name: str
    kind: str
    judged: Judged
    edge: str = ""
    """The suite that was exactly at its margin."""

    @property
    def edge_passed(self) -> bool:
        return any(result.name == self.edge and result.decision == "passed" for result in self.judged.results)


def draws(cases: Sequence[Case], rule: Rule, count: int, seed: int) -> Iterator[Drawn]:
    """``count`` verdicts on drawn item sets, the cases in turn."""
    return _in_turn(_draw, cases, rule, count, seed)


def draws_unchanged(cases: Sequence[Case], rule: Rule, count: int, seed: int) -> Iterator[Drawn]:
    """As :func:`draws`, under exact no change."""
    return _in_turn(_draw_unchanged, cases, rule, count, seed)


def draws_at_margin(cases: Sequence[Case], rule: Rule, count: int, seed: int) -> Iterator[Drawn]:
    """As :func:`draws`, with one retention suite, each in turn, exactly at its margin."""
    return _in_turn(_draw_at_margin, cases, rule, count, seed)


Draw = Callable[[Case, Rule, int, Generator], Drawn]
"""The verdict on a case's item set, given its number among those of the case."""


def _in_turn(draw: Draw, cases: Sequence[Case], rule: Rule, count: int, seed: int) -> Iterator[Drawn]:
    tasks = [(case, len(range(place, count, len(cases))), [seed, place]) for place, case in enumerate(cases)]
    return chain.from_iterable(in_processes(partial(_sets, draw, rule), tasks, few=FEW))


def _sets(draw: Draw, rule: Rule, task: tuple[Case, int, list[int]]) -> list[Drawn]:
    case, count, seed = task
    rng = np.random.default_rng(seed)
    return [draw(case, rule, number, rng) for number in range(count)]


def _draw(case: Case, rule: Rule, number: int, rng: Generator) -> Drawn:
    return Drawn(case.name, case.kind, judge(case.rows(pick(case, rng)), rule))


def _draw_unchanged(case: Case, rule: Rule, number: int, rng: Generator) -> Drawn:
    return Drawn(case.name, case.kind, judge(unchanged(case, case.rows(pick(case, rng)), rng), rule))


def _draw_at_margin(case: Case, rule: Rule, number: int, rng: Generator) -> Drawn:
    retention = [suite for suite in case.suites if suite.role == "retention"]
    edge = retention[number % len(retention)]
    at_edge = unchanged(case, case.rows(pick(case, rng)), rng, edge, edge.margin or rule.margin)
    return Drawn(case.name, case.kind, judge(at_edge, rule), edge.name)
