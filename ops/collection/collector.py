"""Deletes what a plan lists, in an order that is safe against a kill at any point."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from core import metrics
from core.artifacts import Artifacts
from core.errors import LeaseLost, ReleaseConflict
from core.ledger import Ledger
from core.ledger.collection import COLLECT_LEASE
from core.ledger.leases import renewing
from core.progress import say
from core.settings import Settings
from ops.collection.plan import CollectionPlan, Item, home_items, make_plan

T = TypeVar("T")
LEASE_SECONDS: Final = 120.0
TRIES: Final = 3
"""A release during the decision invalidates it."""
TOGETHER: Final = 50
"""Adapters deleted between updates of the ledger and checks of the lease."""


class Collector:
    """Collects the garbage of one installation. A lease in the ledger allows one collector at a time."""

    def __init__(self, settings: Settings, ledger: Ledger, artifacts: Artifacts) -> None:
        self.settings = settings
        self.ledger = ledger
        self.artifacts = artifacts
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def plan(self) -> CollectionPlan:
        """The current plan. Raises LedgerError, ArtifactsUnavailable."""
        plan = make_plan(self.settings, self.ledger, self.artifacts)
        local = home_items(self.settings.home, self.ledger, self.settings.gc.keep_days)
        return CollectionPlan(plan.live, (*plan.items, *local))

    def run(self, actor: str = "ratchet") -> CollectionPlan | None:
        """Delete what the plan lists. None, with nothing done, while another collector or a backup is running. Raises
        LedgerError, ArtifactsUnavailable when a store is unavailable or clocks disagree. Before the first deletion
        nothing has changed; after it, the next run continues."""
        epoch = self.ledger.acquire_lease(COLLECT_LEASE, self._holder, LEASE_SECONDS)
        if epoch is None:
            return None
        try:
            with renewing(self.ledger, COLLECT_LEASE, epoch, LEASE_SECONDS):
                return self._run(actor, epoch)
        finally:
            self.ledger.release_lease(COLLECT_LEASE, epoch)

    def _run(self, actor: str, epoch: int) -> CollectionPlan:
        plan, marked = self._mark(actor, epoch)
        adapters = {item.name: item for item in plan.going if item.kind == "adapter"}
        kept = {("carry-over", name) for name in adapters.keys() - set(marked)}
        going = [item for item in plan.going if item.kind != "adapter" and (item.kind, item.name) not in kept]
        done = CollectionPlan(plan.live, (*(adapters[name] for name in marked), *going))
        for some in _parts(marked):
            self._check(epoch)
            for name in some:
                self.artifacts.delete(adapters[name].key)
            self.ledger.finish_collection({name: adapters[name].bytes for name in some})
            metrics.maintain.collected("adapter", sum(adapters[name].bytes for name in some))
        for items in _parts(going):
            self._check(epoch)
            for item in items:
                self._delete(item)
        if done.items:
            counts = done.summary()["goes"]
            self.ledger.audit(actor, "collect garbage", "artifacts", {**counts, "bytes": done.freed})
        return done

    def _mark(self, actor: str, epoch: int) -> tuple[CollectionPlan, list[str]]:
        for attempt in range(TRIES):
            plan = self.plan()
            reasons = {item.name: item.reason for item in plan.going if item.kind == "adapter"}
            try:
                return plan, self.ledger.begin_collection(reasons, live=plan.live, epoch=epoch, actor=actor)
            except ReleaseConflict as error:
                if attempt == TRIES - 1:
                    raise
                say(f"gc: {error}")
        raise AssertionError  # unreachable

    def _check(self, epoch: int) -> None:
        if not self.ledger.renew_lease(COLLECT_LEASE, epoch, LEASE_SECONDS):
            raise LeaseLost("another collector, or a backup, took over.", "The next run goes on.")

    def _delete(self, item: Item) -> None:
        if item.kind in ("carry-over", "report"):
            self.artifacts.delete(item.key)
        else:
            path = self.settings.home / item.name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        metrics.maintain.collected(item.kind, item.bytes)


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), TOGETHER):
        yield items[start : start + TOGETHER]
