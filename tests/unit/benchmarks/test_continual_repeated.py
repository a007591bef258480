"""Orders and seeds: means, spreads, and a comparison over the chains that two methods share."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.continual.chain import Unit
from benchmarks.continual.outcomes import Course, Hits, Reference
from benchmarks.continual.repeated import beside, repeated

RNG = np.random.default_rng(0)
BASE: Hits = {name: (RNG.random(200) < 0.5).astype(float) for name in ("new", "old")}
ASKED = Reference(BASE, ("new",), ("old",), BASE)


def course(name: str, order: int, seed: int, gain: int, loss: int = 0, dip: int = 0) -> Course:
    """A stream of two updates: ``dip`` points lost after the first, and gain and loss at its end, in items."""

    def moved(suite: str, up: int, down: int) -> np.ndarray:
        hits = BASE[suite].copy()
        hits[np.flatnonzero(hits == 0)[:up]] = 1
        hits[np.flatnonzero(BASE[suite] == 1)[:down]] = 0
        return hits

    first = {"new": moved("new", 0, dip), "old": BASE["old"]}
    return Course(
        Unit(name, order, seed), (BASE, first, {"new": moved("new", gain, 0), "old": moved("old", 0, loss)}), ()
    )


def test_mean_and_spread_over_chains_and_the_mean_of_each_order() -> None:
    courses = [course("a", 0, 0, 20, loss=2), course("a", 0, 1, 40), course("a", 2, 0, 30, loss=4, dip=10)]
    found = repeated(courses, ASKED)
    assert found["chains"] == 3
    assert (found["a_ka_delta"], found["a_ka_sd"]) == (15.0, 5.0)
    assert found["a_zs_delta"] == -1.0
    assert {order: (means["a_ka"], means["a_zs"]) for order, means in found["by_order"].items()} == {
        "0": (15.0, -0.5), "2": (15.0, -2.0)
    }  # fmt: skip
    new, old = BASE["new"].mean(), BASE["old"].mean()
    assert found["gm_lowest"] == pytest.approx(100 * (np.sqrt((new - 0.05) * old) - np.sqrt(new * old)), abs=0.01)


def test_one_chain_has_no_spread() -> None:
    assert "gm_sd" not in repeated([course("a", 0, 0, 20)], ASKED)


def test_two_methods_are_compared_over_the_chains_that_both_have() -> None:
    ours = [course("a", 0, 0, 40), course("a", 1, 0, 40), course("a", 1, 1, 0, loss=50)]
    others = [course("b", 1, 0, 20), course("b", 0, 0, 20), course("b", 2, 0, 60)]
    found = beside(ours, others, ASKED)
    new, old = BASE["new"].mean(), BASE["old"].mean()
    assert found is not None
    assert found.value == pytest.approx(100 * (np.sqrt((new + 0.2) * old) - np.sqrt((new + 0.1) * old)))
    assert found.clear
    same = beside(ours[:2], ours[:2], ASKED)
    assert same is not None
    assert not same.clear
    assert beside(ours[2:], others, ASKED) is None


def test_each_order_is_compared_for_itself() -> None:
    standard = [course("a", 0, 0, 20), course("a", 0, 1, 20), course("a", 1, 0, 0)]
    found = repeated([course("b", 0, 0, 60), course("b", 0, 1, 60), course("b", 1, 0, 0)], ASKED, standard)
    first, second = (found["by_order"][order]["against_default"] for order in ("0", "1"))
    assert first["clear"]
    assert first["value"] == round(beside([course("b", 0, 0, 60)], standard[:1], ASKED).value, 2)  # type: ignore[union-attr]
    assert (second["value"], second["clear"]) == (0, False)
    assert first["value"] > found["against_default"]["value"] > 0
    assert repeated(standard, ASKED)["against_default"] is None
