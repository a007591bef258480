"""Is it learning, and what does it cost: updates, verdicts and the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from core.ledger import Ledger, UpdateRow, VerdictRow
from core.settings import Settings

RUNNING = ("training", "trained", "gated")
DAY_SECONDS = 86_400


@dataclass(frozen=True)
class UpdateSummary:
    """One update and what became of it."""

    update: UpdateRow
    verdict: VerdictRow | None

    @property
    def running(self) -> bool:
        """Whether it is not finished."""
        return self.update.state in RUNNING

    @property
    def again(self) -> bool:
        """Whether it is a further look at a candidate that an earlier update trained."""
        return "trained_by" in self.update.cost

    @property
    def train_gflops(self) -> float:
        """Memory-adjusted compute of training; none for a further look at a candidate that was trained before."""
        if self.again:
            return 0.0
        return float(self.update.cost.get("gflops_spent") or 0.0)

    @property
    def gate_gflops(self) -> float:
        """Compute of judging it."""
        return float(self.update.cost.get("gate_gflops") or 0.0)

    @property
    def train_seconds(self) -> float:
        """Time of training it; see :attr:`train_gflops`."""
        return 0.0 if self.again else float(self.update.cost.get("seconds") or 0.0)

    @property
    def gate_seconds(self) -> float:
        """Time of judging it."""
        return float(self.update.cost.get("gate_seconds") or 0.0)

    @property
    def look(self) -> str:
        """Which look at the candidate it was, and what that spent; empty where nothing was spent."""
        look = self.verdict.summary.get("look") if self.verdict else None
        if look is None or not look["made"]:
            return ""
        items = f"{look['items']:,} of {look['needed']:,} items"
        return f"number {look['number']} with {items}, {look['spent']:.2g} of {look['alpha']:.2g} spent"

    @property
    def best_gain(self) -> tuple[str, float] | None:
        """The gain suite that won most, and by how much."""
        return self._extreme("gain", max)

    @property
    def worst_loss(self) -> tuple[str, float] | None:
        """The retention suite that changed least for the good, and by how much."""
        return self._extreme("retention", min)

    def _extreme(self, role: str, choose: Callable[..., tuple[str, float]]) -> tuple[str, float] | None:
        suites = self.verdict.summary.get("suites", {}) if self.verdict else {}
        differences = [(name, float(suite["difference"])) for name, suite in suites.items() if suite["role"] == role]
        if not differences:
            return None
        return choose(differences, key=lambda pair: pair[1])


@dataclass(frozen=True)
class BudgetState:
    """The token bucket. Amounts are memory-adjusted GFLOPs."""

    level: float
    capacity: float
    per_update: float
    spent: float

    @property
    def share(self) -> float:
        """How full it is."""
        return max(0.0, min(1.0, self.level / self.capacity))

    @property
    def updates_left(self) -> int:
        """Whole updates that it pays for now."""
        return max(0, int(self.level // self.per_update))

    @property
    def wait_seconds(self) -> float:
        """Until it pays for the next one; 0 when it does."""
        return max(0.0, (self.per_update - self.level) / self.capacity * DAY_SECONDS)


@dataclass(frozen=True)
class Costs:
    """What updates took together. Compute of training is memory-adjusted GFLOPs, as the budget counts; that of the gate
    is GFLOPs.
    """

    updates: int
    train_gflops: float
    train_seconds: float
    gate_runs: int
    gate_gflops: float
    gate_seconds: float


def costs(rows: Sequence[UpdateSummary], since: datetime | None = None) -> Costs:
    """The sum over updates that began at ``since`` or later; over all of ``rows`` where it is None."""
    chosen = [row for row in rows if since is None or row.update.created_at >= since]
    judged = [row for row in chosen if row.gate_seconds or row.gate_gflops]
    return Costs(
        updates=sum(row.train_gflops > 0 for row in chosen),
        train_gflops=sum(row.train_gflops for row in chosen),
        train_seconds=sum(row.train_seconds for row in chosen),
        gate_runs=len(judged),
        gate_gflops=sum(row.gate_gflops for row in judged),
        gate_seconds=sum(row.gate_seconds for row in judged),
    )


def update_summaries(ledger: Ledger, limit: int = 20) -> list[UpdateSummary]:
    """The newest updates, newest first."""
    verdicts = {verdict.update_id: verdict for verdict in ledger.verdicts(limit * 2)}
    return [UpdateSummary(update, verdicts.get(update.id)) for update in ledger.updates(limit)]


def budget_state(ledger: Ledger, settings: Settings) -> BudgetState:
    """What is left to spend."""
    budget = settings.budget
    capacity = budget.gflops_per_day
    level = ledger.bucket_level(time.time(), capacity / DAY_SECONDS, capacity)
    return BudgetState(level, capacity, min(budget.gflops_per_update, capacity), ledger.spent())
