from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gate import lineage_report
from benchmarks.gate.lineage import Course, Lineage, worst_loss
from benchmarks.gate.lineage_world import LAST, MOVES_MORE, Churn, Kind, World, kinds, noise_of, read_churn
from core.settings.updates import Gate

MEASURED = Churn(0.148, 0.218, 0.149)
STILL = Kind("still", 0.0, 1e-4, 1.0)
ITEMS = 800


def lineage(items: int = ITEMS) -> Lineage:
    return Lineage(items, STILL, Gate(audit_every=1), np.random.default_rng(0))


def test_the_churn_is_that_of_the_committed_chains() -> None:
    found = read_churn()
    assert (found.first, found.last, found.previous) == pytest.approx((0.148, 0.218, 0.149), abs=1e-3)


@pytest.mark.parametrize("churn", [MEASURED, MOVES_MORE])
def test_simulated_answers_move_as_far_as_measured(churn: Churn) -> None:
    step, kept = noise_of(churn)
    world = World(20_000, Kind("kind", 0.0, step, kept), np.random.default_rng(0))
    model, moved = world.base, []
    for number in range(LAST):
        model = world.updated(model, np.zeros(7), str(number))
        moved.append(np.std([a.hits - b.hits for a, b in zip(model.all, world.base.all, strict=True)]))
    assert (moved[0], moved[-1]) == pytest.approx((churn.first, churn.last), abs=2e-3)


def test_a_model_has_the_truth_that_it_was_given_whatever_its_noise() -> None:
    world = World(40_000, kinds(MEASURED)[1], np.random.default_rng(0))
    truth = np.linspace(-0.1, 0.05, 7)
    model = world.updated(world.updated(world.base, truth, "first"), truth, "second")
    assert [marks.hits.mean() - 0.5 for marks in model.all] == pytest.approx(truth, abs=0.01)
    assert {len(marks.hits) for marks in model.judged} == {30_000}, "a quarter is sealed"


def test_a_lineage_without_churn_passes_the_harmless_and_stops_both_losses() -> None:
    course = lineage().run(2)
    counts = course.counts
    assert counts["harmless"] == counts["harmless_passed"] == counts["mean_loss"] == counts["edge"] == 2
    assert counts["mean_loss_mean"] == counts["mean_loss_passed"] == counts["edge_passed"] == 0
    assert counts["releases"] == counts["audits"] > 0
    assert counts["audits_failed"] == counts["harmful"] == 0
    assert -0.05 < course.standing < 0.05, "of the audited release"


def test_a_failed_audit_takes_the_lineage_back_to_the_last_audited_release() -> None:
    one = lineage()
    audited = one.live = one.audited = one.world.updated(one.base, np.zeros(7), "audited")
    one.live = one.world.updated(audited, np.full(7, -0.2), "harmful")
    one._audit()
    assert one.live is audited and one.course.counts["audits_failed"] == 1
    assert one.course.counts["audits_failed_falsely"] == one.course.counts["harmless_audits"] == 0
    assert one.course.standing == -1.0, "nothing was left in place"


def test_harm_that_an_audit_leaves_in_place_makes_a_lineage_a_false_accept() -> None:
    one = lineage(items=40)  # ten sealed items of a suite show nothing
    one.live = one.world.updated(one.base, np.array([-0.06, *[0.0] * 6]), "harmful")
    one._audit()
    assert one.audited is one.live and worst_loss(one.live, one.base) == pytest.approx(0.06)
    assert one.course.false_accept(0.05) and not one.course.false_accept(0.07)


def test_a_candidate_is_compared_with_the_best_release() -> None:
    one = lineage()
    one.world.kind = Kind("rising", 0.03, 1e-4, 1.0)
    one._propose(0)
    better = one.live
    one.live = one.world.updated(better, better.truth - 0.02, "later")
    references = one.references()
    assert references.incumbent is one.live and references.best is better
    lost = one.judge(one.world.updated(one.live, one.live.truth, "same"), references).mean
    assert lost is not None and lost.decision == "failed" and "the best release update0" in lost.reason


def test_figures_count_events_and_the_headline_leaves_the_variant_out() -> None:
    figures = lineage_report.run(Gate(), lineages=1, updates=1, sizes=(80,), workers=1)
    assert [cell["kind"] for cell in figures["cells"]] == [kind.name for kind in kinds(MEASURED)]
    assert figures["total"]["lineages"] == 2 and figures["total"]["harmless_passed"]["of"] == 2
    assert figures["lineage_false_accepts"] == 0.0 and figures["harmful_releases"]["count"] == 0
    stopped = figures["total"]["mean_loss_stopped"]
    assert figures["mean_loss_stopped"] == stopped["rate"] == stopped["count"] / 2


def test_an_interval_over_lineages_is_wide_if_they_differ() -> None:
    assert lineage_report.interval(np.array([[5, 10]] * 8)) == [0.5, 0.5]
    low, high = lineage_report.interval(np.array([[0, 10], [10, 10]] * 4)) or (0.5, 0.5)
    assert low < 0.3 and high > 0.7
    assert lineage_report.interval(np.zeros((3, 2))) is None
    assert not Course(80, STILL).false_accept(0.05), "nothing was audited"
