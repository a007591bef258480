from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gate import counting
from benchmarks.gate.cases import Case, Rule, judge, judged_of
from benchmarks.gate.plans import DRIFT, family
from benchmarks.gate.redrawn import Redrawn, deal, figures_of, redraw
from benchmarks.gate.resample import draws, draws_at_margin, draws_unchanged, lowered, share_to_lose, swapped
from core.ledger.rows import GateOutcome
from core.settings.updates import Gate
from tests.unit.updater.gate.builders import suite_over
from updater.gate.suites import Suite
from updater.gate.verdict import MEAN

RULE = Rule.of(Gate())
N = 400


def hits(share: float, views: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((N, views)) < share).astype(float)


def after(before: np.ndarray, lost: float, gained: float, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed).random(before.shape)
    return np.where(before > 0, chance >= lost, chance < gained).astype(float)


KNOWN, CLASSES, NEW = (
    suite_over(hits(0.5, 2, 0), "known", "retention", "retrieval", 0.08),
    suite_over(hits(0.5, 1, 0), "classes", "retention", "classification", 0.08),
    suite_over(hits(0.3, 2, 0), "fresh.new", "gain", "retrieval"),
)
KNOWN, CLASSES = (suite.model_copy(update={"data": "-"}) for suite in (KNOWN, CLASSES))  # of no stream: the base counts
SUITES: tuple[Suite, ...] = (KNOWN, CLASSES, NEW)
SIZES = {suite.name: N for suite in SUITES}
BASE = {suite.name: hits(0.45, len(suite.views), seed) for seed, suite in enumerate(SUITES)}


def case(name: str, lost: float, gained: float = 0.25, kind: str = "kind", before: dict | None = None) -> Case:
    """Lose this share of all hits of the retention suites, and find this share of the new domain's misses."""
    given = before or BASE
    found = {s.name: after(given[s.name], lost, min(lost, 0.02) * 0.8, 10 + i) for i, s in enumerate((KNOWN, CLASSES))}
    found[NEW.name] = after(given[NEW.name], 0.02, gained, 20)
    return Case(name, kind, SUITES, SIZES, BASE, given, found)


GOOD_ONE, BAD_ONE = case("good", 0.02), case("bad", 0.9)


def test_what_was_lost_earlier_is_seen_by_the_comparison_with_the_base_alone() -> None:
    """The incumbent has already lost 13 points; the candidate changes nothing."""
    incumbent = {name: after(found, 0.3, 0.0, 30) for name, found in BASE.items()}
    late = case("late", 0.01, before=incumbent)
    assert late.truth(RULE) == "harmful" and late.without_base().truth(RULE) == "good"
    assert not judge(late, RULE).retained and judge(late.without_base(), RULE).retained
    (found,) = counting.rows([replace(late, kind=DRIFT)], [late], RULE)
    drifted = counting.drift([found], RULE, {"late": late})
    assert drifted["caught_at"] == drifted["harmful_from"] == 1
    assert drifted["steps"][0]["by"] == ["known", "classes", MEAN]
    assert drifted["let_in_without_base"] == 1
    assert drifted["caught_before_harm"], "the harmful one is kept out"
    (let_in,) = counting.rows([replace(late, kind=DRIFT)], [late.without_base()], RULE)
    assert not counting.drift([let_in], RULE, {"late": late})["caught_before_harm"]


def test_a_swap_leaves_no_difference_and_all_disagreement_and_lowering_costs_the_margin_exactly_on_average() -> None:
    before, bad, good = BASE["known"], BAD_ONE.after["known"], GOOD_ONE.after["known"]
    rng = np.random.default_rng(0)
    same, less = [], []
    for _ in range(300):
        first, second = swapped(before, bad, rng)
        assert np.array_equal(first != second, before != bad)
        same.append((second - first).mean())
        first, second = swapped(before, good, rng)
        less.append((lowered(second, share_to_lose(before, good, 0.08), rng) - first).mean())
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5
    assert abs((bad - before).mean()) > 0.05, "the real difference is one that would have been seen"
    assert abs(np.mean(less) + 0.08) < 4 * np.std(less) / 300**0.5
    with pytest.raises(ValueError, match="cannot lose"):
        share_to_lose(np.zeros((9, 1)), np.ones((9, 1)) * 0.1, 0.08)


def test_a_draw_keeps_the_harmful_out_lets_the_good_in_and_shows_no_gain_where_nothing_changed() -> None:
    for one, passed in ((BAD_ONE, 0), (GOOD_ONE, 12)):
        assert counting.tally(draws([one], RULE, 12, seed=0))["passed"]["count"] == passed
    assert list(draws([], RULE, 12, seed=0)) == []
    found = counting.tally(draws_unchanged([GOOD_ONE], RULE, 40, seed=3))
    assert found["gain_shown"]["count"] <= 5, "3% of 40 are expected"
    assert found["all_kept"]["count"] >= 35 and found["rejected"]["count"] <= 2


@pytest.mark.long
def test_at_the_margin_each_suite_in_turn_is_rarely_passed() -> None:
    found = list(draws_at_margin([GOOD_ONE], RULE, 60, seed=4))
    assert {one.edge for one in found} == {"known", "classes"}
    assert sum(one.edge_passed for one in found) <= 7, "3% of 60 are expected"
    assert sum(one.judged.gained for one in found) > 50, "what was learnt is still there"
    lax = list(draws_at_margin([GOOD_ONE], replace(RULE, level=0.4, loss_level=0.4), 60, seed=4))
    assert 12 <= sum(one.edge_passed for one in lax) <= 36, "the size of the test is its level"


def test_a_case_with_ranks_is_judged_by_them_and_has_the_truth_of_its_hits() -> None:
    """As many hits, but every miss of the new domain is now a near one, which recall@5 does not see."""

    def ranks(outcomes: dict, near: int) -> dict:
        return {name: np.where(found > 0, 0, near if name == NEW.name else 60) for name, found in outcomes.items()}

    base = ranks(BASE, 60)
    ranked = Case("ranked", "kind", SUITES, SIZES, base, base, ranks(BASE, 6))
    hits = Case("hits", "kind", SUITES, SIZES, BASE, BASE, BASE)
    assert ranked.gained == hits.gained == 0.0 and ranked.lost(KNOWN) == hits.lost(KNOWN)
    assert judge(ranked, RULE).gained and not judge(hits, RULE).gained
    lost = {name: lowered(found, 0.5, np.random.default_rng(0)) for name, found in ranked.after.items()}
    assert judge(replace(ranked, after=lost), RULE).outcome == "rejected"


def test_shares_of_candidates_carry_exact_intervals() -> None:
    found = counting.share(0, 60)
    assert found["low"] == 0.0
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / 60))
    assert counting.share(0, 0)["rate"] is None
    assert counting.others(counting.share(2, 60)) == pytest.approx(counting.share(58, 60))


def test_shares_of_item_sets_carry_intervals_over_families_of_candidates() -> None:
    """Ten families, of which one passes always: its 25 item sets say no more than one."""
    sets = [(f"naive-{number:02d}x0.{place}", number == 0) for number in range(10) for place in range(25)]
    found = counting.clustered(sets)
    assert (found["count"], found["of"], found["families"], found["rate"]) == (25, 250, 10, 0.1)
    assert found["low"] == 0.0 and found["high"] == pytest.approx(0.3)
    assert found["high"] > counting.share(25, 250)["high"] + 0.1, (
        "an exact interval takes the item sets for independent"
    )
    none = counting.clustered((name, False) for name, _ in sets)
    assert (none["low"], none["high"]) == (0.0, counting.share(0, 10)["high"])
    assert counting.clustered([])["rate"] is None


def test_scaled_and_continued_candidates_and_the_drift_are_of_one_family() -> None:
    names = ("naive-01x0.214", "naive-01", "second-03", "first-03", "drift-04")
    assert [family(name) for name in names] == ["naive-01", "naive-01", "first-03", "first-03", "drift"]


def test_the_gate_judges_three_quarters_of_the_items_in_service_and_the_mean_counts() -> None:
    assert judged_of(400) == 300 and judged_of(7) == 6
    spread_out = case("spread out", 0.08)
    assert spread_out.beyond(RULE) < 0 < spread_out.excess(RULE), "both suites are inside, their mean is not"
    assert spread_out.mean_lost == pytest.approx(np.mean([spread_out.lost(suite) for suite in (KNOWN, CLASSES)]))
    assert spread_out.truth(RULE) == "harmful" and judge(spread_out, RULE).unproven == [MEAN]
    few = replace(spread_out, judged={"known": 100, "classes": 300, NEW.name: 50})
    assert {name: len(found) for name, found in few.own().after.items()} == few.judged
    assert few.mean_lost == pytest.approx(0.25 * few.lost(KNOWN) + 0.75 * few.lost(CLASSES))
    (row,) = counting.rows([spread_out], [spread_out], RULE)
    found = counting.counted([row])
    assert found["harmful_by_mean_alone"] == 1 and found["false_accepts_further"]["of"] in (0, 1)


def test_false_accepts_are_of_the_harmful_and_false_rejects_of_the_good() -> None:
    """Verdicts use the suites' own draw, which may differ from all items."""
    cases = [GOOD_ONE, BAD_ONE, case("unlucky", 0.02), case("lucky", 0.9)]
    assert [one.truth(RULE) for one in cases] == ["good", "harmful"] * 2 and BAD_ONE.beyond(RULE) > 0
    assert case("idle", 0.0, gained=0.0).truth(RULE) == "idle"
    seen = [GOOD_ONE, BAD_ONE, replace(BAD_ONE, name="unlucky"), replace(GOOD_ONE, name="lucky")]
    found = counting.counted(counting.rows(cases, seen, RULE))
    assert (found["harmful"], found["good"], found["idle"]) == (2, 2, 0)
    assert (found["false_accepts"]["count"], found["false_accepts"]["of"]) == (1, 2)
    assert [found[key]["count"] for key in ("false_rejects", "good_rejected", "good_not_kept")] == [1, 1, 1]
    assert counting.by_kind(counting.rows(cases, seen, RULE))["kind"] == found


def test_redrawn_items_let_the_good_in_and_keep_the_bad_out_by_a_truth_that_the_gate_was_not_shown() -> None:
    shown = {"known": 300, "classes": 100, "fresh.new": 399}
    seen, unseen = deal(replace(GOOD_ONE, judged=shown), np.random.default_rng(0))
    assert {name: len(items) for name, items in seen.items()} == shown
    assert all(sorted([*seen[name], *unseen[name]]) == list(range(N)) for name in SIZES)
    found = list(redraw([GOOD_ONE, BAD_ONE], dict.fromkeys(SIZES, 300), RULE, 6, seed=0))
    assert [one.outcome for one in found] == ["passed"] * 6 + ["rejected"] * 6
    assert all(one.beyond < 0 for one in found[:6]) and all(one.beyond > 0.2 for one in found[6:])


def test_errors_are_counted_where_the_truth_lies() -> None:
    def one(
        name: str, beyond: float, gained: float, outcome: GateOutcome, worst: float = 0.2, mean: float = 0.0
    ) -> Redrawn:
        return Redrawn(name, "kind", beyond, worst, mean, gained, outcome, outcome == "passed")

    found = figures_of([
        one("harmful", 0.01, 0.02, "passed"), one("harmful", 0.01, 0.02, "rejected"),
        one("without gain", 0.01, 0.0, "rejected"), one("far", 0.05, 0.02, "rejected"),
        one("good", -0.03, 0.04, "inconclusive"), one("good", -0.04, 0.04, "passed"),
        one("good but near", -0.01, 0.04, "rejected", worst=0.8), one("small gain", -0.04, 0.02, "inconclusive"),
        one("lossy", -0.03, 0.04, "passed", mean=0.02), one("lossy", 0.05, 0.04, "rejected", mean=0.03),
    ], 0.015)  # fmt: skip
    assert (found["false_accepts"]["count"], found["false_accepts"]["of"]) == (1, 2)
    assert (found["false_accepts_any_gain"]["of"], found["false_accepts_beyond"]["of"]) == (3, 2)
    assert (found["false_rejects_gain3"]["count"], found["false_rejects_gain3"]["of"]) == (1, 2)
    assert found["false_rejects_gain3_any_mean"]["of"] == 4
    assert (found["candidates_at_margin"], found["candidates_gain3"]) == (1, 1)
    assert (found["mean_loss_stopped"]["count"], found["mean_loss_stopped"]["of"]) == (1, 2)
    assert (found["mean_loss_stopped_suites_inside"]["count"], found["mean_loss_stopped_suites_inside"]["of"]) == (0, 1)
    (low,) = [row for row in found["by_mean"] if row["from"] == 0.0175]
    assert (low["passed"]["count"], low["passed"]["of"]) == (1, 1)
