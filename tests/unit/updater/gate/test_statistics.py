"""The statistics against published values, identities, and error rates by enumeration and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from updater.gate import statistics
from updater.gate.interim_analyses import AnalysisPlan, InterimAnalysis, candidate_alpha, needed_items, spending
from updater.gate.statistics import (
    bootstrap,
    compare_accuracy,
    compare_clusters,
    holm,
    mcnemar_superior,
    pool,
    reciprocal_log_rank,
    tango_interval,
    tango_z,
)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "level", "low", "high"),
    [
        (1, 7, 21, 0.025, -0.517, -0.026),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake
        (6, 16, 161, 0.025, -0.1240, -0.0054),  # Cavo et al. 2012, ibid.
        (28, 25, 618, 0.05, -0.0148, 0.0247),  # PropCIs::scoreci.mp(25, 28, 618, 0.90)
    ],
)
def test_tango_matches_published_values(gained: int, lost: int, n: int, level: float, low: float, high: float) -> None:
    assert tango_interval(gained, lost, n, level) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("n", [40, 150, pytest.param(600, marks=pytest.mark.long)])
@pytest.mark.parametrize("level", [0.05, 0.03, 0.005])
def test_tango_size_at_the_margin_is_at_most_its_level(n: int, level: float) -> None:
    """Exact probability of a false accept when the true loss equals the margin, by enumeration of all tables.

    A score test is asymptotic, so a tenth above its level is allowed; small levels do not reach it.
    """
    margin = 0.05
    for loss in (0.05001, 0.07, 0.1, 0.2, 0.4):
        gain = loss - margin
        changed = stats.binom.pmf(np.arange(n + 1), n, gain + loss)
        size = sum(
            changed[m] * share
            for m in np.flatnonzero(changed > 1e-10)
            for g, share in enumerate(stats.binom.pmf(np.arange(m + 1), m, gain / (gain + loss)))
            if share * changed[m] > 1e-9 and stats.norm.sf(tango_z(int(g), int(m - g), n, -margin)) <= level
        )
        assert size <= 1.1 * level


def test_mcnemar_is_the_exact_binomial_test() -> None:
    expected = stats.binomtest(14, 19, 0.5, alternative="greater").pvalue
    assert mcnemar_superior(14, 5) == pytest.approx(expected)
    assert mcnemar_superior(0, 0) == 1.0


def _change(rng: np.random.Generator, n: int, loss: float) -> np.ndarray:
    """Two correlated views per item; afterwards each view is lost or gained with chances that differ by `loss`."""
    skill = rng.random((n, 1))
    before = (rng.random((n, 2)) < 0.2 + 0.6 * skill).astype(float)
    common = rng.random((n, 1)) < 0.5  # half of the changes hit both views of an item
    draw = np.where(common, rng.random((n, 1)), rng.random((n, 2)))
    fall, rise = (0.06 + loss / 2) / before.mean(), (0.06 - loss / 2) / (1 - before.mean())
    after = np.where(before == 1, (draw >= fall).astype(float), (draw < rise).astype(float))
    change: np.ndarray = (after - before).mean(axis=1)
    return change


def at_most(shown: int, runs: int, level: float) -> bool:
    """Whether the count of false positives fits this level: at most three standard errors above it."""
    return shown / runs <= level + 3 * math.sqrt(level * (1 - level) / runs)


@pytest.mark.parametrize("loss", [0.05, 0.0], ids=["of the margin is accepted", "of nothing is a gain"])
def test_a_test_of_recall_keeps_its_level(loss: float) -> None:
    """The true difference varies a little around the loss, by the sampled hit share."""
    rng, level, runs, shown = np.random.default_rng(0), 0.05, 1500, 0
    for seed in range(runs):
        shown += bootstrap(_change(rng, 150, loss), seed=seed, draws=999).p_above(-loss) <= level
    assert at_most(shown, runs, level)


def test_two_views_of_one_item_are_not_two_items() -> None:
    """With identical views, the interval is that of n items; treating 2n outcomes as independent would shrink it."""
    rng = np.random.default_rng(3)
    before = rng.integers(0, 2, (200, 1)).astype(float)
    after = np.where(rng.random((200, 1)) < 0.15, 1 - before, before)
    single = bootstrap((after - before)[:, 0])
    double = compare_clusters(np.repeat(before, 2, 1), np.repeat(after, 2, 1), margin=0.05, level=0.05)
    assert double.bounds(0.05) == pytest.approx((single.low(0.05), single.high(0.05)))


def test_bootstrap_agrees_with_students_t_on_many_items() -> None:
    rng = np.random.default_rng(4)
    change = rng.choice([-1, -0.5, 0, 0.5, 1], size=2000, p=[0.02, 0.1, 0.72, 0.12, 0.04])
    result = bootstrap(change, draws=20_000)
    low, high = stats.t.interval(0.9, 1999, loc=change.mean(), scale=stats.sem(change))
    assert (result.low(0.05), result.high(0.05)) == pytest.approx((low, high), abs=1e-3)


def test_interval_and_test_of_recall_tell_the_same_story() -> None:
    rng = np.random.default_rng(6)
    for _ in range(40):
        boot = bootstrap(_change(rng, 300, 0.02), draws=1999)
        assert (boot.p_above(-0.05) <= 0.05) == (boot.low(0.05) >= -0.05 - 1e-12)
        assert (boot.p_below(0.0) <= 0.05) == (boot.high(0.05) <= 1e-12)


def test_no_change_at_all_is_not_certainty() -> None:
    """Ten unchanged items cannot exclude a loss of 5 points; a thousand can."""
    few, many = np.zeros((10, 2)), np.zeros((1000, 2))
    assert compare_clusters(few, few, margin=0.05, level=0.05).p_noninferior > 0.05
    assert compare_clusters(many, many, margin=0.05, level=0.05).p_noninferior < 0.01
    assert compare_accuracy(few[:, 0], few[:, 0], margin=0.05).p_noninferior > 0.05
    assert compare_accuracy(many[:, 0], many[:, 0], margin=0.05).p_noninferior < 0.01
    ranks = reciprocal_log_rank(np.arange(100).reshape(50, 2))
    same = compare_clusters(ranks, ranks, margin=0.05, level=0.03, graded=True)
    assert same.difference == 0.0 and same.p_superior > 0.3, "no rank changed: that is no gain"


@pytest.mark.parametrize(
    ("p_values", "shown", "shares"),
    [
        ([0.012, 0.2, 0.001, 0.02], [True, False, True, True], [3, 1, 4, 2]),
        ([0.02, 0.03, 0.021], [False] * 3, [3] * 3),
    ],
    ids=["each at its level", "none after the first that is not shown"],
)
def test_holm_matches_its_definition(p_values: list[float], shown: list[bool], shares: list[int]) -> None:
    found, levels = zip(*holm(p_values, 0.05), strict=True)
    assert list(found) == shown and levels == pytest.approx([0.05 / share for share in shares])


def test_misaligned_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="align"):
        compare_clusters(np.zeros((4, 2)), np.zeros((5, 2)), margin=0.05, level=0.05)
    with pytest.raises(ValueError, match="3 clusters for 4 items"):
        compare_clusters(np.zeros((4, 2)), np.zeros((4, 2)), np.arange(3), margin=0.05, level=0.05)


def test_questions_with_an_image_each_are_an_accuracy_unless_they_earn_fractions() -> None:
    rng = np.random.default_rng(0)
    before, after = (rng.random((2, 200)) < 0.6).astype(float)
    names = np.arange(200)
    one = compare_clusters(before, after, names, margin=0.05, level=0.03)
    two = compare_accuracy(before, after, margin=0.05)
    assert (one.p_noninferior, one.p_superior, one.units) == (two.p_noninferior, two.p_superior, 200)
    assert "Tango" in one.method
    thirds = rng.integers(0, 4, 200) / 3
    assert "bootstrap over items" in compare_clusters(thirds, thirds, names, margin=0.05, level=0.03).method


def test_clustered_answers_accept_a_loss_of_the_margin_at_most_at_their_level() -> None:
    """Four questions on each of 80 images: what happens to an image happens to all its questions."""
    rng, before, names = np.random.default_rng(2), np.ones(320), np.repeat(np.arange(80), 4)
    accepted = {"clustered": 0, "naive": 0}
    for _ in range(300):
        after = before - np.repeat(rng.random(80) < 0.1, 4)
        clustered = compare_clusters(before, after, names, margin=0.1, level=0.05)
        naive = compare_clusters(before, after, np.arange(320), margin=0.1, level=0.05)
        assert clustered.difference == pytest.approx(naive.difference)
        accepted["clustered"] += clustered.p_noninferior <= 0.05
        accepted["naive"] += naive.p_noninferior <= 0.05
    assert at_most(accepted["clustered"], 300, 0.05)
    assert accepted["naive"] > 1.5 * accepted["clustered"], "what independence would have claimed"
    assert (clustered.units, clustered.n) == (80, 320) and "clusters" in clustered.method
    assert clustered.needed(0.05) > naive.needed(0.05)


def test_images_with_many_questions_weigh_more_and_the_mean_is_over_questions() -> None:
    before = np.ones(100)
    after = np.concatenate([np.zeros(10), np.ones(90)])  # one image of ten questions, all lost
    names = np.array([0] * 10 + list(range(1, 91)))
    found = compare_clusters(before, after, names, margin=0.05, level=0.03)
    assert found.difference == pytest.approx(-0.1) and found.after == pytest.approx(0.9)
    assert found.bounds(0.03)[0] < -0.2, "one image says little"


def test_a_pool_is_the_mean_over_strata_by_their_units() -> None:
    rng = np.random.default_rng(12)
    changes = [rng.choice([-0.5, 0.0, 0.5], n, p=[0.1, 0.7, 0.2]) for n in (300, 100, 50)]
    strata = [
        compare_clusters(np.zeros(len(change)) + 0.5, change + 0.5, margin=0.05, level=0.03, seed=i)
        for i, change in enumerate(changes)
    ]
    found = pool(strata, 0.05)
    shares = np.array([300, 100, 50]) / 450
    mean = float(shares @ [change.mean() for change in changes])
    error = math.sqrt(float(shares**2 @ [change.var(ddof=1) / len(change) for change in changes]))
    assert found.difference == pytest.approx(mean) and found.after - found.before == pytest.approx(mean)
    assert (found.n, found.units) == (450, 450) and "3 strata" in found.method
    low, high = found.bounds(0.05)
    assert (low, high) == pytest.approx(stats.norm.interval(0.9, mean, error), abs=0.006)
    assert pool(strata[:1], 0.05) is strata[0]


def _retrieval(rng: np.random.Generator, n: int, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranks among 300 before and after, in both directions: correct answers are at different depths, and all move."""
    depth = rng.normal(1.2, 1.2, n)
    sides = []
    for shift in (0.0, drift):
        score = depth[:, None] + shift + rng.normal(0.0, 0.2, (n, 2))
        sides.append(np.floor(300 * stats.norm.sf(score)).astype(np.int32))
    return sides[0], sides[1]


@pytest.mark.parametrize("n", [50, 150])
def test_the_rank_statistic_keeps_its_level_and_shows_what_recall_does_not(n: int) -> None:
    rng = np.random.default_rng(14)
    level, runs = 0.05, 300
    shown = {"no gain": 0, "gain": 0, "gain by recall": 0}
    for seed in range(runs):
        for what, drift in (("no gain", 0.0), ("gain", 0.1)):
            before, after = _retrieval(rng, n, drift)
            change = (reciprocal_log_rank(after) - reciprocal_log_rank(before)).mean(axis=1)
            boot = bootstrap(change, reach=float(np.abs(change).max()), seed=seed, draws=999)
            shown[what] += boot.p_above(0.0) <= level
        hits = ((after < 5).astype(float) - (before < 5)).mean(axis=1)
        shown["gain by recall"] += bootstrap(hits, seed=seed, draws=999).p_above(0.0) <= level
    assert at_most(shown["no gain"], runs, level)
    assert shown["gain"] > 1.4 * shown["gain by recall"]


def test_drawing_counts_and_drawing_clusters_are_the_same_bootstrap() -> None:
    """Values with a negligible difference are drawn one by one, equal ones by their counts."""
    rng = np.random.default_rng(15)
    change = rng.choice([-0.5, 0.0, 0.5], 200, p=[0.1, 0.75, 0.15])
    few, many = bootstrap(change), bootstrap(change + rng.normal(0.0, 1e-9, 200))
    assert (many.low(0.03), many.high(0.03)) == pytest.approx((few.low(0.03), few.high(0.03)), abs=2e-3)


def test_draws_reach_the_level_and_what_tests_have_of_it_when_they_share_it() -> None:
    for level, tests in ((0.05, 1), (0.001, 1), (0.001, 60), (1e-9, 1)):
        draws = statistics._draws(level, tests)
        assert statistics.RESAMPLES <= draws <= statistics.MAX_RESAMPLES
        if 25 / level < statistics.MAX_RESAMPLES:
            assert level * draws >= 25 and (level / tests) * draws >= 2


def look(alpha: float, loss_alpha: float, tested: list[int], items: int, needed: int) -> InterimAnalysis:
    return AnalysisPlan(alpha, loss_alpha, needed, tuple(tested)).look(items)


def nominal(alpha: float, looks: list[int], needed: int) -> list[float]:
    return [look(alpha, alpha, looks[:i], items, needed).level for i, items in enumerate(looks)]


@pytest.mark.parametrize(
    ("looks", "bounds"),
    [
        ([2, 4], [2.9626, 1.9686]),
        ([1, 2, 3, 4], [4.3326, 2.9631, 2.3590, 2.0141]),
        ([1, 2, 3, 4, 5], [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]),
    ],
)
def test_the_bounds_of_looks_are_the_published_ones(looks: list[int], bounds: list[float]) -> None:
    """Lan and DeMets' function of O'Brien-Fleming type at 2.5%, equally spaced looks (as gsDesign tabulates them)."""
    levels = nominal(0.025, looks, looks[-1])
    assert stats.norm.isf(levels) == pytest.approx(bounds, abs=2e-4)


@pytest.mark.parametrize("items", [500, 900])
@pytest.mark.parametrize("failed", [0, 5, 50])
def test_one_look_is_an_ordinary_test_and_losses_have_all_of_alpha(items: int, failed: int) -> None:
    share = candidate_alpha(0.05, failed)
    alone = look(share, 0.05, [], items, 500)
    assert (alone.level, alone.loss_level) == pytest.approx((share, 0.05), abs=1e-9)
    assert (alone.number, alone.spent, alone.next) == (1, pytest.approx(share), None)


def test_what_looks_spend_adds_up_to_the_candidates_share() -> None:
    first, last = look(0.03, 0.05, [], 250, 500), look(0.03, 0.05, [250, 375], 500, 500)
    assert first.spent == pytest.approx(spending(0.03, 0.5)) == pytest.approx(first.level)
    assert first.before == 0.0 and look(0.03, 0.05, [250], 375, 500).before == first.spent
    assert (last.number, last.spent, last.next) == (3, pytest.approx(0.03), None)
    assert 0.8 * 0.03 < last.level < 0.03
    second = look(0.01, 0.05, [250], 500, 500)
    assert first.loss_level + second.loss_level >= 0.05 > second.loss_level > first.loss_level > first.level


def test_a_look_without_new_items_or_with_hardly_any_spends_nothing() -> None:
    again = look(0.03, 0.05, [250], 250, 500)
    assert again.level == 0.0 and again.spent == pytest.approx(spending(0.03, 0.5))
    assert look(0.03, 0.05, [], 10, 500).level == 0.0


def test_a_candidate_is_asked_again_with_each_quarter_of_the_needed_items_and_given_up_after_all() -> None:
    looks = [60]
    while (following := look(0.03, 0.05, looks[:-1], looks[-1], 500).next) is not None:
        looks.append(following)
    assert looks == [60, 185, 310, 435, 500]
    assert look(0.03, 0.05, [], 501, 500).next is None
    assert look(0.03, 0.05, [], 1, 3).next == 2


def test_shares_of_all_candidates_together_stay_below_alpha() -> None:
    shares = [candidate_alpha(0.05, k) for k in range(5000)]
    assert sum(shares) < 0.05
    assert sum(shares) == pytest.approx(0.05, rel=1e-3)
    assert shares[0] == pytest.approx(0.05 * 6 / math.pi**2)
    with pytest.raises(ValueError, match="candidates is -1"):
        candidate_alpha(0.05, -1)


def test_needed_items_follow_from_spread_power_and_what_is_to_be_seen() -> None:
    usual = {"detect": 0.03, "alpha": 0.03, "power": 0.8}
    wanted = needed_items(0.22, **usual)
    z = stats.norm.isf(0.03) + stats.norm.ppf(0.8)
    assert wanted == math.ceil((z * 0.22 / 0.03) ** 2)
    assert needed_items(0.22, **usual | {"detect": 0.015}) == pytest.approx(4 * wanted, abs=4)
    assert needed_items(0.22, **usual | {"alpha": 0.003}) > wanted
    assert needed_items(0.22, **usual | {"power": 0.9}) > wanted
    assert needed_items(None, **usual) > wanted  # the prior is on the safe side
    assert needed_items(0.01, **usual | {"detect": 0.2}, fewest=50) == 50
    assert needed_items(0.22, **usual | {"detect": 0.001}, fewest=50, most=2000) == 2000
    # a gain of 3 points in hits alone has a variance of 0.03 * 0.97, also where earlier candidates changed nothing
    assert needed_items(0.001, **usual) == needed_items((0.03 * 0.97 / 2.6) ** 0.5, **usual) > 90


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """[runs, items] cumulated differences with mean 0 and deviation 1."""
    return np.cumsum(np.random.default_rng(7).standard_normal((40_000, 100), dtype=np.float32), axis=1)


def accepted(sums: np.ndarray, looks: list[int], levels: list[float], gain: float = 0.0) -> float:
    z = np.stack([(sums[:, n - 1] + gain * n) / math.sqrt(n) for n in looks], axis=1)
    return float((z >= stats.norm.isf(levels)).any(axis=1).mean())


@pytest.mark.parametrize("looks", [[100], [25, 50, 75, 100], [10, 35, 60, 85, 100], [60, 85, 110], [98, 100]])
def test_a_candidate_without_gain_passes_with_at_most_its_share(noise: np.ndarray, looks: list[int]) -> None:
    looks = [min(n, 100) for n in looks]
    rate, error = accepted(noise, looks, nominal(0.03, looks, 100)), math.sqrt(0.03 * 0.97 / len(noise))
    assert rate <= 0.03 + 3 * error
    assert rate >= 0.03 - 3 * error, "it is spent, too"


@pytest.mark.parametrize("looks", [[100], [25, 50, 75, 100]])
def test_a_gain_of_the_wanted_size_is_shown_with_the_wanted_power(noise: np.ndarray, looks: list[int]) -> None:
    # so large that 100 items of deviation 1 are needed
    gain = float(stats.norm.isf(0.03) + stats.norm.ppf(0.8)) / 10
    assert needed_items(1.0, detect=gain * 1.000001, alpha=0.03, power=0.8) == 100
    assert accepted(noise, looks, nominal(0.03, looks, 100), gain) == pytest.approx(0.8, abs=0.02)
