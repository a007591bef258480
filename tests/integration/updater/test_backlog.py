"""A backlog larger than any budget: updates go on, all of it is accounted for, and failures do not restart."""

from __future__ import annotations

import json

from prometheus_client import REGISTRY

from core.settings import Settings
from ops.cli.status import collect
from tests.integration.updater.home import add_samples, changed, made_by
from updater.service.update_loop import UpdaterService

BACKLOG = 60
VISITED = 6 * 3
"""Steps, and new rows of a batch of 9 without replay."""


def counted() -> tuple[float, ...]:
    names = ("ratchet_update_visited_total", "ratchet_update_passed_over_total")
    return tuple(REGISTRY.get_sample_value(name, {"family": "clip"}) or 0.0 for name in names)


def test_what_a_budget_does_not_pay_for_is_passed_over_and_counted_and_the_draw_is_that_of_the_settings(
    settings: Settings,
) -> None:
    add_samples(settings, BACKLOG)
    before = counted()
    service = UpdaterService(settings)
    update = made_by(service)
    visits = {"pending": BACKLOG, "visited": VISITED, "passed_over": BACKLOG - VISITED}
    assert {name: update.cost[name] for name in visits} == visits and update.cost["samples_new"] == VISITED
    assert counted() == (before[0] + VISITED, before[1] + BACKLOG - VISITED)
    assert service.step().reason == "there are no new samples"  # passed over is tried
    facts = collect(settings)
    assert json.loads(json.dumps(facts["visits"])) == {update.id: visits}
    again = made_by(service, retry=True)
    newest = made_by(UpdaterService(changed(settings, "updater", draw="newest")), retry=True)
    assert update.adapter == again.adapter != newest.adapter


def test_a_budget_that_pays_for_no_step_is_waited_for_and_not_tried_again(settings: Settings) -> None:
    """Neither new data nor a request for a single update retries it: only another budget or recipe does."""
    add_samples(settings, BACKLOG)
    service = UpdaterService(changed(settings, "budget", gflops_per_update=1e-3))
    failed = made_by(service, "failed")
    assert "does not pay for one step with its own rows" in str(failed.error)
    assert service.ledger.spent(failed.id) == 0
    for now in (False, True):
        add_samples(settings, 20)
        outcome = service.step(now=now)
        assert outcome.update is None
        assert failed.id in outcome.reason and "raise budget.gflops_per_update" in outcome.reason
    assert len(service.ledger.updates()) == 1
    gflops = 2 * failed.cost["gflops_needed"]
    richer = made_by(UpdaterService(changed(settings, "budget", gflops_per_update=gflops)))
    assert richer.cost["pending"] == BACKLOG + 40 and richer.cost["steps"] >= 1
    assert richer.cost["gflops_spent"] <= gflops
