from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from updater.gate.interim_analyses import AnalysisPlan, InterimAnalysis, candidate_alpha, needed_items, spending


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
def test_one_look_with_all_items_is_an_ordinary_test_and_losses_have_all_of_alpha_whatever_failed(
    items: int, failed: int
) -> None:
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
def test_a_candidate_without_gain_passes_one_of_its_looks_with_at_most_its_share(
    noise: np.ndarray, looks: list[int]
) -> None:
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
