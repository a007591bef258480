from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from core.settings.serving import Rollout
from serving.releases.guard import (
    FALSE_ALARM,
    ComparisonCounts,
    Evidence,
    Observations,
    RequestCounts,
    broken,
    look,
    look_number,
    together,
)

SETTINGS = Rollout()
LIVE, INCUMBENT = 7, 6
LOOKS = 150
"""Five minutes, at one look in two seconds."""


class Life:
    """A watched release under traffic, look by look."""

    def __init__(self, seed: int, *, errors: float = 0.002, slower: float = 0.3, agrees: float = 0.95) -> None:
        self.random = np.random.default_rng(seed)
        self.rates = (errors, slower, agrees)
        self.seen = Observations(
            LIVE, {LIVE: RequestCounts(), INCUMBENT: RequestCounts(5000, int(self.random.binomial(5000, 0.002)))},
            {"clip": ComparisonCounts()},
        )  # fmt: skip

    def step(self, requests: int = 50, inputs: int = 3) -> None:
        errors, slower, agrees = self.rates
        self.seen.requests[LIVE].add(RequestCounts(requests, int(self.random.binomial(requests, errors))))
        counted = ComparisonCounts(inputs, int(self.random.binomial(inputs, agrees)), inputs,
                           int(self.random.binomial(inputs, slower)), inputs)  # fmt: skip
        self.seen.compared["clip"].add(counted)

    def until_broken(self) -> tuple[int, str] | None:
        for number in range(LOOKS):
            self.step()
            if bad := broken(look(SETTINGS, self.seen, INCUMBENT, number + 1)):
                return number, bad[0].guardrail
        return None


def test_a_release_like_its_incumbent_is_never_taken_back() -> None:
    assert [seed for seed in range(60) if Life(seed).until_broken()] == []


def test_a_release_that_is_just_within_every_bound_is_seldom_taken_back() -> None:
    bounds = {"errors": 0.004, "slower": 0.5, "agrees": SETTINGS.min_agreement}
    alarms = sum(Life(seed, **bounds).until_broken() is not None for seed in range(100, 160))
    assert alarms <= 60 * FALSE_ALARM + 4


@pytest.mark.parametrize(
    ("breach", "guardrail"),
    [({"errors": 0.2}, "errors"), ({"slower": 0.98}, "latency"), ({"agrees": 0.1}, "agreement")],
)
def test_each_breach_is_caught_within_thirty_seconds(breach: dict[str, float], guardrail: str) -> None:
    for seed in range(30):
        found = Life(seed, **breach).until_broken()
        assert found is not None, seed
        assert (found[1], found[0] <= 15) == (guardrail, True), seed


def evidence(seen: Observations, guardrail: str, number: int = 6) -> Evidence:
    (found,) = [one for one in look(SETTINGS, seen, INCUMBENT, number) if one.guardrail == guardrail]
    return found


def test_a_guardrail_allows_what_its_bound_and_the_incumbent_allow() -> None:
    def errs(requests: dict[int, RequestCounts]) -> bool:
        return evidence(Observations(LIVE, requests), "errors").broken

    def disagrees(agreed: int) -> bool:
        return evidence(Observations(LIVE, {}, {"vlm": ComparisonCounts(80, agreed)}), "agreement").broken

    assert not disagrees(32) and disagrees(0), "a VLM may change most answers about what it learned, but not all"
    assert not errs({LIVE: RequestCounts(1000, 15)}), "an incumbent that answered nothing yet is not held to be perfect"
    assert errs({LIVE: RequestCounts(60, 60)})
    outage = {LIVE: RequestCounts(400, 200), INCUMBENT: RequestCounts(4000, 2000)}
    assert not errs(outage), "an incumbent that fails as often excuses the release"
    assert errs(outage | {INCUMBENT: RequestCounts(4000, 20)})
    assert broken(look(SETTINGS, Observations(LIVE), INCUMBENT, 1)) == [], "nothing was seen"
    assert broken(look(SETTINGS, Observations(LIVE, {}, {"vlm": ComparisonCounts()}), INCUMBENT, 500_000)) == []


def test_failures_in_comparisons_count_for_a_shadow_that_answers_nobody() -> None:
    shadow = Observations(
        LIVE, {LIVE: RequestCounts(), INCUMBENT: RequestCounts(900, 0)}, {"vlm": ComparisonCounts(tried=40, failed=40)}
    )
    found = evidence(shadow, "errors")
    assert found.broken
    assert (found.bad, found.shown) == (40, "40 of 40 requests failed, 0 of 940 of release 6")


def test_the_chance_of_the_counts_is_that_of_a_binomial_at_the_bound() -> None:
    found = evidence(Observations(LIVE, {}, {"clip": ComparisonCounts(inputs=40, agreed=2)}), "agreement")
    assert (found.bad, found.of, found.allowed) == (38, 40, 0.3)
    assert found.chance == pytest.approx(binom.sf(37, 40, 0.3))
    assert found.shown == "2 of 40 inputs agree (5%), at least 70% must"


def test_each_look_spends_a_part_of_the_false_alarms_and_its_number_is_the_time_since_the_commit() -> None:
    assert [look_number(seconds) for seconds in (-1.0, 0.0, 1.9, 2.0, 20.0)] == [1, 1, 1, 2, 11]
    levels = [evidence(Observations(LIVE), "errors", number).level for number in range(1, 5001)]
    assert levels == sorted(levels, reverse=True)
    assert sum(levels) * 5 <= FALSE_ALARM


def test_processes_add_up_and_comparisons_of_another_release_do_not_count() -> None:
    ours = Observations(LIVE, {LIVE: RequestCounts(3, 1)}, {"clip": ComparisonCounts(2, 1)})
    late = Observations(
        INCUMBENT, {INCUMBENT: RequestCounts(5, 0), LIVE: RequestCounts(1, 0)}, {"clip": ComparisonCounts(9, 9)}
    )
    total = together(LIVE, [ours, late, ours])
    assert (total.requests[LIVE], total.requests[INCUMBENT]) == (RequestCounts(7, 2), RequestCounts(5, 0))
    assert (total.compared["clip"].inputs, total.compared["clip"].agreed) == (4, 2)
