from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.updater.gate.builders import changed, outcomes, ranked, scores, suite_over
from updater.gate.decision import BASE, INCUMBENT, RANK_STATISTIC, Findings, Scores, conclude, decide
from updater.gate.verdict import Check, SuiteResult

LEVEL = 0.03


def hits(n: int, share: float, views: int = 1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, views)) < share).astype(float)


def findings(*entries: Scores, min_items: int = 50, margin: float = 0.05, mean_margin: float = 0.05) -> Findings:
    return decide(entries, level=LEVEL, loss_level=LEVEL, margin=margin, mean_margin=mean_margin, min_items=min_items)


def judge(*entries: Scores, **how: Any) -> tuple[SuiteResult, ...]:
    return findings(*entries, **how).results


def decisions(*entries: Scores, **how: Any) -> str:
    return " ".join(result.decision for result in judge(*entries, **how))


KEPT = scores("kept", hits(600, 0.5), changed(hits(600, 0.5), 8, 9))
LOST = scores("lost", hits(600, 0.5), changed(hits(600, 0.5), 120, 10))
FEW = scores("few", hits(30, 0.5), hits(30, 0.5))
LEARNT = scores("new", hits(300, 0.4, 2), changed(hits(300, 0.4, 2), 15, 90), role="gain")
NO_GAIN = scores("new", hits(300, 0.4, 2), changed(hits(300, 0.4, 2), 30, 31), role="gain")
WORSE = scores("worse", hits(300, 0.5, 2), changed(hits(300, 0.5, 2), 90, 10), role="gain")
BARELY = scores("barely", hits(300, 0.5), changed(hits(300, 0.5), 10, 8))
FINE = [Check("finite", True, "all finite")]


@pytest.mark.parametrize(
    ("entries", "outcome", "decided", "reason"),
    [
        ([KEPT, LEARNT], "passed", "passed passed", "gained"),
        ([KEPT, LOST, LEARNT], "rejected", "passed failed passed", "lost: lost 18.3 points against the incumbent"),
        ([KEPT, LEARNT, WORSE], "rejected", "passed passed failed", "on new data"),
        ([FEW, LEARNT], "inconclusive", "inconclusive passed", "only 30 items"),
        ([KEPT, NO_GAIN], "inconclusive", "passed inconclusive", "no gain shown"),
        ([LEARNT], "inconclusive", "passed", "not protected"),
        ([KEPT], "inconclusive", "passed", "no fresh samples"),
    ],
)
def test_only_what_kept_everything_and_learnt_passes(
    entries: list[Scores], outcome: str, decided: str, reason: str
) -> None:
    found = findings(*entries)
    assert decisions(*entries) == decided
    concluded, reasons = conclude(found, FINE)
    assert concluded == outcome and reason in reasons[0]
    broken = Check("finite", False, "3 of 9 vectors hold NaN")
    assert conclude(found, [broken])[1][0] == "finite: 3 of 9 vectors hold NaN"
    assert {conclude(each, [broken])[0] for each in (found, Findings((), None))} == {"rejected"}


def test_small_losses_everywhere_are_stopped_by_their_mean_though_each_suite_stays_inside_its_margin() -> None:
    entries = [scores(f"s{i}", hits(800, 0.5), changed(hits(800, 0.5), 24, 8)) for i in range(6)]  # 2 points each
    found = findings(*entries, LEARNT, mean_margin=0.015)
    assert {result.decision for result in found.results} == {"passed"}
    assert found.mean is not None and found.mean.decision == "failed" and found.mean.units == 4800
    outcome, reasons = conclude(found, FINE)
    assert outcome == "rejected" and reasons == (
        "mean loss: lost 2.0 points on average against the incumbent (from 47.9% to 45.9%)",
    )
    wider = findings(*entries, LEARNT, mean_margin=0.04)
    assert conclude(wider, FINE)[0] == "passed" and "at most 2.5 points lost" in str(wider.mean)
    few = findings(scores("few", hits(800, 0.5), changed(hits(800, 0.5), 10, 6)), LEARNT, mean_margin=0.01)
    assert few.mean is not None and few.mean.decision == "inconclusive" and few.mean.needed > 800
    assert conclude(few, FINE)[1][0].startswith("mean loss: a loss of")


def test_the_mean_is_compared_with_base_and_best_release_and_what_was_learned_hides_no_loss_to_the_base() -> None:
    base, live = hits(800, 0.5), changed(hits(800, 0.5), 0, 80)
    below_live = scores("static", live, base, base=base)  # ten points below the incumbent, equal to the base
    below_base = scores("static", changed(base, 80, 0), changed(base, 80, 0), base=base)
    learned = scores("memory.flags", changed(base, 0, 200), changed(base, 0, 200), base=base)
    assert not learned.suite.data
    for entry, reference in ((below_live, INCUMBENT), (below_base, BASE)):
        static = replace(entry, suite=entry.suite.model_copy(update={"data": "x"}))
        found = findings(static, learned, LEARNT, margin=0.3, mean_margin=0.03)
        assert found.mean is not None and found.mean.decision == "failed" and reference in found.mean.reason
    suite = KEPT.suite.model_copy(update={"data": "x"})
    best = replace(KEPT, suite=suite, best=outcomes(changed(hits(600, 0.5), 0, 30)), best_name="clip-best")
    found = findings(best, learned, LEARNT, margin=0.2, mean_margin=0.03)
    assert found.mean is not None and "the best release clip-best" in found.mean.reason


def test_a_loss_that_chance_makes_in_one_of_many_suites_is_undecided_and_not_a_failure() -> None:
    """Nine worse and one better of a hundred: p = 0.011, significant at 3% alone, but not as one of four large
    suites.
    """
    doubtful = scores("doubtful", hits(100, 0.5), changed(hits(100, 0.5), 9, 1))
    assert decisions(doubtful) == decisions(doubtful, FEW, FEW, FEW).split()[0] == "failed"
    others = [scores(f"other{n}", hits(100, 0.5), changed(hits(100, 0.5), 6, 6)) for n in range(3)]
    found = findings(doubtful, *others, LEARNT)
    assert [r.decision for r in found.results[:4]] == ["inconclusive"] * 4
    assert conclude(found, FINE)[0] == "inconclusive"


@pytest.mark.parametrize("role", ["retention", "gain"])
def test_one_item_less_than_min_items_decides_nothing_whatever_it_shows(role: str) -> None:
    """Nothing lost of a wide margin, everything learned, everything lost: each is decided from `min_items` on."""
    before = hits(50, 0.5)
    shown = before if role == "retention" else np.ones_like(before)
    for after, decision in ((shown, "passed"), (np.zeros_like(before), "failed")):
        entry = scores("few", before, after, role=role, margin=0.3 if role == "retention" else None)
        assert [decisions(entry, min_items=least) for least in (50, 51)] == [decision, "inconclusive"]
    if role == "gain":
        learned = scores("few", before, shown, role="gain")
        enough, too_few = (findings(learned, min_items=least).gain for least in (50, 51))
        assert enough is not None and too_few is not None
        assert (enough.decision, too_few.decision) == ("passed", "inconclusive")
        assert f"of few from {before.mean():.1%} to 100.0%" in enough.reason


def test_a_wide_interval_is_inconclusive_and_says_how_many_items_would_tell() -> None:
    (result,) = judge(scores("noisy", hits(80, 0.5), changed(hits(80, 0.5), 12, 12)))
    assert result.decision == "inconclusive" and result.ci_low < -0.05 < result.ci_high
    assert result.needed > 80 and f"about {result.needed} items" in result.reason


def test_small_losses_that_add_up_are_caught_against_the_base_and_against_the_best_release() -> None:
    """Each step stays inside the margin; the sum of the steps does not."""
    base = hits(600, 0.6)
    incumbent = changed(base, 24, 0)
    entry = scores("drift", incumbent, changed(incumbent, 12, 0))
    (alone,) = judge(entry)
    assert alone.decision == "passed" and alone.best_release is None
    (both,) = judge(replace(entry, base=outcomes(base)))
    assert both.decision == "failed" and both.difference_base == pytest.approx(-0.06)
    assert both.p == both.p_base > both.p_incumbent

    further = replace(entry, base=outcomes(changed(base, 100, 0)), best=outcomes(base), best_name="clip-best")
    (result,) = judge(further)
    assert result.decision == "failed" and "against the best release clip-best" in result.reason
    assert result.best == "clip-best" and result.best_release is not None
    assert result.best_release.difference == pytest.approx(-0.06)
    assert result.margin_left == pytest.approx(result.best_release.ci_low + 0.05)
    assert result.p == result.best_release.p > alone.p


def test_every_interval_tells_the_same_story_as_its_decision() -> None:
    rng = np.random.default_rng(1)
    entries = []
    for i in range(12):
        before = hits(300, 0.5, views=1 + i % 2, seed=i)
        entries.append(scores(f"s{i}", before, changed(before, *map(int, rng.integers(0, 30, 2)))))
    results = judge(*entries)
    assert {"passed", "inconclusive"} <= {r.decision for r in results}
    for result in results:
        inside = min(result.ci_low, result.ci_base_low) >= -result.margin
        assert (result.decision == "passed") == inside, result.name


def test_a_suites_own_margin_counts_before_the_setting() -> None:
    before = hits(600, 0.5)
    after = changed(before, 40, 20)
    assert decisions(scores("s", before, after)) != "passed"
    assert decisions(scores("s", before, after, margin=0.1)) == "passed"


def at_most_the_level(count: int, runs: int) -> bool:
    return count / runs <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / runs)


def test_false_accepts_stay_below_the_level() -> None:
    """A whole gate with five suites, one of which truly loses its margin: rarely all are passed."""
    rng = np.random.default_rng(2)
    accepted, runs = 0, 150
    for _ in range(runs):
        entries = []
        for i, loss in enumerate((0.05, 0.0, 0.0, 0.0, 0.0)):
            before, draw = (rng.random((300, 1)) < 0.5).astype(float), rng.random((300, 1))
            after = np.where(before == 1, draw >= 0.06 + loss, draw < 0.06 - loss).astype(float)
            entries.append(scores(f"s{i}", before, after))
        accepted += all(r.decision == "passed" for r in judge(*entries))
    assert at_most_the_level(accepted, runs)


@pytest.mark.long
def test_many_suites_without_change_do_not_make_a_rejection_likelier() -> None:
    """Ten suites of items that disagree by a coin flip; at the level each, one run of four would be rejected."""
    rng = np.random.default_rng(5)
    runs, rejected, alone = 80, 0, 0
    for _ in range(runs):
        entries = []
        for i in range(10):
            before, other = (rng.random((2, 60, 1)) < 0.5).astype(float)
            entries.append(scores(f"s{i}", before, np.where(rng.random((60, 1)) < 0.3, other, before)))
        results = judge(*entries)
        rejected += any(r.decision == "failed" for r in results)
        alone += any(r.decision != "passed" and r.ci_high < 0 for r in results)
    assert at_most_the_level(rejected, runs)
    assert alone > 3 * max(rejected, 1)


def asked_twice(before: np.ndarray, after: np.ndarray, role: str = "retention") -> Scores:
    first, clusters = outcomes(before), np.repeat(np.arange(len(before) // 2), 2)
    return Scores(suite_over(before, "asked", role, "vqa"), first, first, outcomes(after), 0.25, clusters=clusters)


def test_min_items_counts_images_and_captions_and_not_their_items() -> None:
    before = hits(160, 0.6)
    asked = asked_twice(before, before)
    (enough,) = judge(asked, min_items=80, margin=0.1)
    assert (enough.decision, enough.n, enough.task) == ("passed", 160, "vqa")
    assert enough.method == "studentised bootstrap over clusters" and enough.by_view.keys() == {"answer"}
    before = hits(500, 0.5, views=2)
    captions = replace(scores("captions", before, before), clusters=np.repeat(np.arange(50), 10))
    assert decisions(captions, min_items=50) == "passed"
    few = [judge(asked, min_items=81, margin=0.1)[0].reason, judge(captions, min_items=51)[0].reason]
    assert few == [
        "only 80 images (160 questions); at least 81 are asked for",
        "only 50 captions (500 items); at least 51 are asked for",
    ]


FAR, NEAR = 40, 8


def ranked_scores(name: str, before: np.ndarray, after: np.ndarray) -> Scores:
    first, second = (ranked(np.stack([ranks, ranks], axis=1)) for ranks in (before, after))
    return Scores(suite_over(first.hits, name, "gain", "retrieval"), first, first, second)


def test_a_gain_in_ranks_is_shown_where_recall_sees_none_of_it() -> None:
    before = np.where(np.arange(120) < 40, 0, FAR)
    after = np.where((before == FAR) & (np.arange(120) % 3 == 0), NEAR, before)
    found = findings(KEPT, ranked_scores("fresh.new", before, after))
    gain, result = found.gain, found.results[1]
    assert conclude(found, FINE)[0] == "passed"
    assert gain is not None and gain.decision == result.decision == "passed"
    assert (gain.statistic.name, gain.recall.name) == (RANK_STATISTIC, "recall@5")
    assert gain.recall.difference == 0.0 and gain.statistic.difference > 0.02
    assert gain.statistic.p <= LEVEL
    assert result.statistic == gain.statistic and result.difference == 0.0, "one domain is its own pool"


def test_a_gain_in_ranks_does_not_count_while_a_loss_of_recall_is_not_excluded() -> None:
    """Most items move up, but three of the found ones fall out of the first five."""
    before = np.where(np.arange(60) < 20, 4, FAR)
    after = np.where(before == FAR, NEAR, np.where(np.arange(60) < 3, NEAR, 4))
    found = findings(KEPT, ranked_scores("fresh.new", before, after))
    gain = found.gain
    assert gain is not None and gain.statistic.p <= LEVEL < gain.recall.p
    outcome, reasons = conclude(found, FINE)
    assert (outcome, gain.decision) == ("inconclusive", "inconclusive")
    assert "a loss of" in reasons[0] and "recall@5 is not excluded" in reasons[0]


def test_domains_show_together_what_none_of_them_shows_alone() -> None:
    domains = []
    for n in range(4):
        before = hits(100, 0.4, 2, seed=n)
        domains.append(scores(f"fresh.{n}", before, changed(before, 16, 26), role="gain"))
    found = findings(KEPT, *domains)
    assert [r.decision for r in found.results[1:]] == ["inconclusive"] * 4
    gain = found.gain
    assert gain is not None and gain.decision == "passed" and gain.strata == {f"fresh.{n}": 100 for n in range(4)}
    assert gain.recall.difference == pytest.approx(np.mean([r.difference for r in found.results[1:]]))
    assert conclude(found, FINE)[0] == "passed"
    assert conclude(findings(KEPT, domains[0]), FINE)[0] == "inconclusive"


def test_a_gain_suite_with_few_items_counts_in_the_pool_as_much_as_it_has() -> None:
    few = scores("fresh.few", hits(20, 0.5, 2), changed(hits(20, 0.5, 2), 0, 15), role="gain")
    alone, with_others = findings(KEPT, few).gain, findings(KEPT, few, LEARNT).gain
    assert alone is not None and alone.decision == "inconclusive"
    assert "only 20 independent fresh items; at least 50" in alone.reason
    assert with_others is not None and with_others.strata == {"fresh.few": 20, "new": 300}


def test_every_retention_suite_is_tested_at_the_whole_level_of_losses_and_gains_at_their_own() -> None:
    """All must pass, so a further suite makes nothing easier for a bad candidate and costs a good one no level."""
    (retention,), (gain,) = judge(BARELY), judge(LEARNT)
    assert LEVEL / 7 < retention.p <= LEVEL
    assert decisions(BARELY, *[replace(KEPT)] * 6) == " ".join(["passed"] * 7)
    assert {r.alpha for r in judge(BARELY, KEPT, LOST, LEARNT) if r.role == "retention"} == {LEVEL}

    between = 0.5 * retention.p
    assert gain.p < between < retention.p

    def outcome(level: float, loss_level: float) -> str:
        found = decide(
            [BARELY, LEARNT], level=level, loss_level=loss_level, margin=0.05, mean_margin=0.05, min_items=50
        )
        return conclude(found, FINE)[0]

    assert outcome(between, LEVEL) == "passed"
    assert outcome(LEVEL, between) == "inconclusive", "the loss is not excluded"
    assert outcome(1e-9, LEVEL) == "inconclusive", "the gain is not shown"


def test_a_domain_whose_loss_is_not_excluded_is_told_and_holds_nothing_up() -> None:
    unclear = scores("fresh.unclear", hits(60, 0.5, 2), changed(hits(60, 0.5, 2), 9, 8), role="gain")
    found = findings(KEPT, LEARNT, unclear)
    assert conclude(found, FINE)[0] == "passed"
    assert "a loss of" in found.results[2].reason and "recall@5 is not excluded" in found.results[2].reason


def test_what_could_not_pass_for_lack_of_items_was_not_tested() -> None:
    few_new = scores("new", hits(30, 0.4, 2), hits(30, 0.9, 2), role="gain")
    assert findings(KEPT, LEARNT).tested and findings(LOST, NO_GAIN).tested
    for entries in ((KEPT,), (LEARNT,), (KEPT, FEW, LEARNT), (KEPT, few_new), ()):
        assert not findings(*entries).tested


def test_a_vqa_suite_can_fail_and_one_that_no_model_can_answer_is_a_weak_guard() -> None:
    before = hits(400, 0.6)
    assert decisions(asked_twice(before, changed(before, 90, 0))) == "failed"
    guessed, hard = hits(400, 0.27), hits(600, 0.02)
    for entry in (asked_twice(guessed, guessed), scores("hard", hard, hard)):
        assert "weak guard" in judge(entry)[0].reason
    assert "weak guard" not in judge(KEPT)[0].reason
