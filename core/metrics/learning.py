"""Metrics of the updater. Compute is passed in memory-adjusted GFLOPs, as in the ledger, and exported in FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from core.metrics import declared as d

GIGA = 1e9
State = Literal["waiting", "training", "judging", "proposing"]
STATES: tuple[State, ...] = ("waiting", "training", "judging", "proposing")


class update:
    @staticmethod
    def now(family: str, state: State) -> None:
        for each in STATES:
            d.UPDATE_STATE.labels(family, each).set(int(each == state))

    @staticmethod
    def new_samples(family: str, count: int) -> None:
        d.UPDATE_WAITING.labels(family).set(count)

    @staticmethod
    def fresh_items(family: str, items: int, needed: int) -> None:
        d.UPDATE_FRESH.labels(family).set(items)
        d.UPDATE_FRESH_NEEDED.labels(family).set(needed)

    @staticmethod
    def stepped(family: str, losses: Mapping[str, float]) -> None:
        d.UPDATE_STEPS.labels(family).inc()
        for term, loss in losses.items():
            d.UPDATE_LOSS.labels(family, term).set(loss)

    @staticmethod
    def trained(family: str, seconds: float, spent: float) -> None:
        d.UPDATE_SECONDS.labels(family).observe(seconds)
        d.BUDGET_SPENT.labels("train").inc(spent * GIGA)

    @staticmethod
    def visited(family: str, visited: int, passed_over: int) -> None:
        d.UPDATE_VISITED.labels(family).inc(visited)
        d.UPDATE_PASSED_OVER.labels(family).inc(passed_over)

    @staticmethod
    def unjudged(family: str, missing: bool) -> None:
        """True if no update can be judged, because suites or the reference pool are missing."""
        d.UPDATE_UNJUDGED.labels(family).set(missing)

    held = d.UPDATE_HELD.inc

    @staticmethod
    def left_out(family: str, samples: int) -> None:
        d.UPDATE_LEFT_OUT.labels(family).inc(samples)

    @staticmethod
    def cost(family: str, planned: float, spent: float) -> None:
        d.UPDATE_PLANNED.labels(family).set(planned * GIGA)
        d.UPDATE_SPENT.labels(family).set(spent * GIGA)

    @staticmethod
    def finished(family: str, state: str) -> None:
        """``state``: ``done``, ``failed`` or ``abandoned``."""
        d.UPDATES.labels(family, state).inc()

    @staticmethod
    def budget(level: float, size: float, per_update: float) -> None:
        d.BUDGET_LEVEL.set(level * GIGA)
        d.BUDGET_SIZE.set(size * GIGA)
        d.BUDGET_UPDATE.set(per_update * GIGA)


class Score(NamedTuple):
    """Scores of a suite, as shares. ``margin_left`` is None without a margin."""

    suite: str
    role: str
    base: float
    incumbent: float
    candidate: float
    margin_left: float | None


class gate:
    @staticmethod
    def decided(family: str, outcome: str, seconds: float, spent: float) -> None:
        """Record a verdict with its cost. ``kept``: inconclusive, and the candidate is evaluated again."""
        d.GATE_VERDICTS.labels(family, outcome).inc()
        d.GATE_SECONDS.labels(family).observe(seconds)
        d.BUDGET_SPENT.labels("gate").inc(spent * GIGA)

    @staticmethod
    def last(family: str, outcome: str, timestamp: float) -> None:
        """``timestamp``: seconds since 1970."""
        d.GATE_LAST.labels(family, outcome).set(timestamp)

    @staticmethod
    def scored(family: str, scores: Sequence[Score]) -> None:
        """Replace the scores of all suites: domains of fresh samples change between verdicts."""
        d.GATE_SCORE.remove_by_labels({"family": family})
        d.GATE_MARGIN.remove_by_labels({"family": family})
        for each in scores:
            for model in ("base", "incumbent", "candidate"):
                d.GATE_SCORE.labels(family, each.suite, each.role, model).set(getattr(each, model))
            if each.margin_left is not None:
                d.GATE_MARGIN.labels(family, each.suite).set(each.margin_left)

    @staticmethod
    def audited(family: str, failed: bool) -> None:
        d.GATE_AUDIT_FAILED.labels(family).set(failed)

    @staticmethod
    def shifted(family: str, shifts: Mapping[str, tuple[float, float]]) -> None:
        """Replace, by tower, the shift of the candidate's features from the incumbent's and from the base's."""
        d.GATE_SHIFT.remove_by_labels({"family": family})
        for tower, (incumbent, base) in shifts.items():
            d.GATE_SHIFT.labels(family, tower, "incumbent").set(incumbent)
            d.GATE_SHIFT.labels(family, tower, "base").set(base)
