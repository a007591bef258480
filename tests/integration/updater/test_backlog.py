"""A backlog larger than any budget: updates go on, all of it is accounted for, and failures do not restart."""

from __future__ import annotations

import json

import pytest
from prometheus_client import REGISTRY
from rich.console import Console

from core.settings import Settings
from ops.cli.status import collect, screen
from tests.integration.updater.home import add_samples, changed, made_by
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration
BACKLOG = 150


def with_budget(settings: Settings, gflops: float) -> Settings:
    return changed(settings, "budget", gflops_per_update=gflops)


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(f"ratchet_update_{name}_total", {"family": "clip"}) or 0.0


def test_what_a_budget_does_not_pay_for_is_passed_over_and_counted(settings: Settings) -> None:
    add_samples(settings, BACKLOG)
    before = counted("visited"), counted("passed_over")
    service = UpdaterService(settings)
    update = made_by(service)
    cost = update.cost
    visited = 6 * 3  # steps, and new rows of a batch of 9 without replay
    assert (cost["pending"], cost["visited"], cost["passed_over"]) == (BACKLOG, visited, BACKLOG - visited)
    assert cost["samples_new"] == visited
    assert (counted("visited") - before[0], counted("passed_over") - before[1]) == (visited, BACKLOG - visited)
    assert service.step().reason == "there are no new samples"  # passed over is tried
    facts = collect(settings)
    assert facts["visits"] == {update.id: {"pending": BACKLOG, "visited": visited, "passed_over": BACKLOG - visited}}
    json.dumps(facts["visits"])
    console = Console(record=True, width=200)
    console.print(screen(settings))
    text = console.export_text()
    assert "passed over" in text and str(BACKLOG - visited) in text


def test_the_draw_is_the_settings_and_does_not_change_when_an_update_is_made_again(settings: Settings) -> None:
    add_samples(settings, BACKLOG)
    uniform = made_by(UpdaterService(settings))
    again = made_by(UpdaterService(settings), retry=True)
    newest = made_by(UpdaterService(changed(settings, "updater", draw="newest")), retry=True)
    assert uniform.adapter == again.adapter != newest.adapter


def test_a_budget_that_pays_for_no_step_is_waited_for_and_not_tried_again(settings: Settings) -> None:
    """Neither new data nor a request for a single update retries it: only another budget or recipe does."""
    add_samples(settings, BACKLOG)
    poor = with_budget(settings, 1e-3)
    service = UpdaterService(poor)
    failed = made_by(service, "failed")
    assert "does not pay for one step with its own rows" in str(failed.error)
    assert service.ledger.spent(failed.id) == 0
    for now in (False, True):
        add_samples(settings, 20)
        outcome = service.step(now=now)
        assert outcome.update is None
        assert failed.id in outcome.reason and "raise budget.gflops_per_update" in outcome.reason
    assert len(service.ledger.updates()) == 1
    richer = made_by(UpdaterService(with_budget(settings, 2 * failed.cost["gflops_needed"])))
    assert richer.cost["pending"] == BACKLOG + 40
    assert richer.cost["steps"] >= 1
    assert richer.cost["gflops_spent"] <= 2 * failed.cost["gflops_needed"]
