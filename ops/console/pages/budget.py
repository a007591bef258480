"""The page Budget: updates with gains and costs, and what the budget still pays for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from core.ledger import Ledger, UpdateRow, VerdictRow
from core.settings import Settings
from ops.console.request_context import Reader
from updater.gate.plots import BAD, GOOD, INK, LINE, MUTED, OPEN, drawn, figure, style

router = APIRouter()
RUNNING = ("training", "trained", "gated")
DAY_SECONDS = 86_400
SHOWN = 50
SUMMED = 500
COLOURS = {"passed": GOOD, "rejected": BAD, "inconclusive": OPEN}
PLOTTED = 16
"""Updates in a plot; older ones are in the table."""


@router.get("/budget")
def budget(context: Reader) -> Response:
    ledger, settings = context.data.ledger, context.data.settings
    summaries = update_summaries(ledger, limit=SUMMED)
    day = costs(summaries, datetime.now(UTC) - timedelta(days=1))
    return context.page(
        "budget.html", "Budget", budget=budget_state(ledger, settings), updates=summaries[:SHOWN],
        seconds=settings.budget.seconds_per_update,
        spans=(("Last 24 hours", day), (f"Last {SUMMED} updates", costs(summaries))),
    )  # fmt: skip


@dataclass(frozen=True)
class UpdateSummary:
    update: UpdateRow
    verdict: VerdictRow | None

    @property
    def outcome(self) -> str:
        return self.verdict.outcome if self.verdict else ""

    @property
    def running(self) -> bool:
        return self.update.state in RUNNING

    @property
    def again(self) -> bool:
        """True if it is a further look at a candidate that an earlier update trained."""
        return "trained_by" in self.update.cost

    @property
    def cost(self) -> dict[str, Any]:
        """The update's cost; only the gate's for a further look."""
        cost = self.update.cost
        return {name: value for name, value in cost.items() if name.startswith("gate_")} if self.again else cost

    @property
    def look(self) -> str:
        """Number and spending of the look at the candidate; empty if nothing was spent."""
        look = self.verdict.summary.get("look") if self.verdict else None
        if look is None or not look["made"]:
            return ""
        items = f"{look['items']:,} of {look['needed']:,} items"
        return f"number {look['number']} with {items}, {look['spent']:.2g} of {look['alpha']:.2g} spent"

    @property
    def best_gain(self) -> tuple[str, float] | None:
        return max(self._differences("gain"), key=itemgetter(1), default=None)

    @property
    def worst_loss(self) -> tuple[str, float] | None:
        """The retention suite with the largest loss, and its difference."""
        return min(self._differences("retention"), key=itemgetter(1), default=None)

    def _differences(self, role: str) -> list[tuple[str, float]]:
        suites = self.verdict.summary.get("suites", {}) if self.verdict else {}
        return [(name, float(suite["difference"])) for name, suite in suites.items() if suite["role"] == role]


@dataclass(frozen=True)
class BudgetState:
    """The token bucket. Amounts are memory-adjusted GFLOPs."""

    level: float
    capacity: float
    per_update: float
    spent: float

    @property
    def share(self) -> float:
        return max(0.0, min(1.0, self.level / self.capacity))

    @property
    def updates_left(self) -> int:
        return max(0, int(self.level // self.per_update))

    @property
    def wait_seconds(self) -> float:
        """Time until it pays for the next update."""
        return max(0.0, (self.per_update - self.level) / self.capacity * DAY_SECONDS)


def costs(rows: Sequence[UpdateSummary], since: datetime | None = None) -> dict[str, float]:
    """Sums over updates that began at ``since`` or later; None: over all. Training is in memory-adjusted GFLOPs, as the
    budget counts; the gate in plain GFLOPs."""
    chosen = [row.cost for row in rows if since is None or row.update.created_at >= since]
    names = {
        "train_gflops": "gflops_spent", "train_seconds": "seconds", "gate_gflops": "gate_gflops",
        "gate_seconds": "gate_seconds",
    }  # fmt: skip
    return {
        "updates": sum(bool(cost.get("gflops_spent")) for cost in chosen),
        "gate_runs": sum(bool(cost.get("gate_seconds") or cost.get("gate_gflops")) for cost in chosen),
        **{name: sum(float(cost.get(key) or 0.0) for cost in chosen) for name, key in names.items()},
    }


def update_summaries(ledger: Ledger, limit: int = 20) -> list[UpdateSummary]:
    verdicts = {verdict.update_id: verdict for verdict in ledger.verdicts(limit * 2)}
    return [UpdateSummary(update, verdicts.get(update.id)) for update in ledger.updates(limit)]


def budget_state(ledger: Ledger, settings: Settings) -> BudgetState:
    budget = settings.budget
    capacity = budget.gflops_per_day
    level = ledger.bucket_level(time.time(), capacity / DAY_SECONDS, capacity)
    return BudgetState(level, capacity, min(budget.gflops_per_update, capacity), ledger.spent())


def learning(summaries: Sequence[UpdateSummary]) -> str:
    """A plot of best gain and worst loss of each judged update, in points, as inline SVG in the gate's style, which
    takes its colours from the page; empty without judged updates."""
    judged = [summary for summary in reversed(summaries) if summary.verdict is not None][-PLOTTED:]
    if not judged:
        return ""
    made = figure(2.5, 7.2)
    axes = made.add_axes((0.075, 0.2, 0.915, 0.74))
    for x, summary in enumerate(judged):
        colour = COLOURS.get(summary.outcome, MUTED)
        gain = summary.best_gain[1] if summary.best_gain else None
        loss = summary.worst_loss[1] if summary.worst_loss else None
        low, high = min(0.0, loss or 0.0), max(0.0, gain or 0.0)
        axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=2.2, solid_capstyle="round")
        if gain is not None:
            axes.plot(x, 100 * gain, "^", color=colour, markersize=8)
        if loss is not None:
            axes.plot(x, 100 * loss, "v", color=colour, markersize=7)
    axes.axhline(0, color=INK, linewidth=0.9)
    style(axes)
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_xticks(range(len(judged)), [f"{each.update.family.upper()}\n{each.outcome}" for each in judged])
    axes.set_xlim(-0.7, max(4.0, len(judged)) - 0.3)
    axes.set_ylabel("points", color=MUTED, fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", colors=MUTED, labelsize=8)
    return drawn(made, "Best gain and worst loss of each update, in points", "l")
