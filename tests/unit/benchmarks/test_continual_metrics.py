"""The papers' figures on matrices whose results are known by hand; intervals, searches and class means against plain
loops.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.continual.chain import Unit
from benchmarks.continual.cross_version import SHARES, apply, backfilled, cross_version_recall
from benchmarks.continual.evaluation import Encoded, Vectors
from benchmarks.continual.intervals import resampled
from benchmarks.continual.metrics import forgetting, geometric_mean, mtil, tic, trajectory
from benchmarks.continual.nearest import NearestMean
from benchmarks.continual.outcomes import Course, Hits, Reference
from benchmarks.continual.repeated import repeated
from benchmarks.continual.stream import Suite
from core.errors import TrainingError
from tests.unit.updater.builders import pairs


def test_means_of_both_kinds_of_suites_and_their_geometric_mean() -> None:
    path = trajectory(np.array([[0.2, 0.4], [0.4, 0.6]]), np.array([[0.6], [0.32]]))
    assert path.a_ka.tolist() == pytest.approx([0.3, 0.5])
    assert path.a_zs.tolist() == pytest.approx([0.6, 0.32])
    assert path.gm.tolist() == pytest.approx([math.sqrt(0.18), 0.4])
    assert geometric_mean(np.array([0.0]), np.array([1.0]))[0] == 0


def test_the_means_of_mtil_and_tic_are_over_the_parts_of_a_matrix_that_the_papers_name() -> None:
    matrix = np.array([[0.9, 0.2, 0.3], [0.8, 0.7, 0.4], [0.6, 0.5, 1.0]])
    whole, parts = mtil(matrix), tic(matrix)
    assert whole.transfer == pytest.approx((0.2 + (0.3 + 0.4) / 2) / 2), "what a suite scored before its own update"
    assert whole.average == pytest.approx((0.9 + 0.2 + 0.3 + 0.8 + 0.7 + 0.4 + 0.6 + 0.5 + 1.0) / 9)
    assert whole.last == pytest.approx((0.6 + 0.5 + 1.0) / 3)
    assert parts.in_domain == pytest.approx((0.9 + 0.7 + 1.0) / 3), "the diagonal"
    assert parts.backward == pytest.approx((0.8 + 0.6 + 0.5) / 3)
    assert parts.forward == pytest.approx((0.2 + 0.3 + 0.4) / 3)
    for kind, few in ((mtil, matrix[:, :1]), (tic, matrix[:1])):
        with pytest.raises(ValueError, match="two"):
            kind(few)


def test_forgetting_is_the_share_of_what_was_learned_that_later_updates_take() -> None:
    path = np.array([[0.5, 0.2, 0.3], [0.9, 0.2, 0.3], [0.8, 0.4, 0.3], [0.725, 0.35, 0.3]])
    sums = forgetting(path)
    assert sums[:, 1] == pytest.approx([0.4**2 + 0.3**2, 0.2**2, 0]), "the last was not learned, and is the last"
    lost, squared = sums.sum(axis=0)
    assert lost / squared == pytest.approx(0.25)
    assert not forgetting(path[:2]).any()


def test_draws_take_the_same_items_for_all_methods() -> None:
    rng = np.random.default_rng(0)
    one = {"a": rng.random(20), "b": rng.random(10), "z": rng.random(15)}
    worse = {name: hits - 0.25 for name, hits in one.items()}
    draws = resampled({"base": [one], "worse": [worse]}, Reference(one, ("a", "b"), ("z",), one), draws=200)
    found = draws.difference("a_ka", "worse", "base")
    assert (found.value, found.low, found.high) == pytest.approx((-25, -25, -25)) and found.clear
    learned, kept = (one["a"].mean() + one["b"].mean()) / 2, one["z"].mean()
    plain = 100 * (math.sqrt((learned - 0.25) * (kept - 0.25)) - math.sqrt(learned * kept))
    assert draws.difference("gm", "worse", "base").value == pytest.approx(plain)


def test_wide_draws_know_what_one_suite_or_one_chain_alone_shows() -> None:
    rng = np.random.default_rng(0)
    one = {name: (rng.random(400) < 0.5).astype(float) for name in "abcdz"}
    gained = [{**one, "a": np.minimum(one["a"] + 0.4, 1.0)}, one]  # in one of four suites, and in one of two chains
    reference = Reference(one, tuple("abcd"), ("z",), one)
    items, wide = (resampled({"base": [one, one], "ours": gained}, reference, wide=wide) for wide in (False, True))
    narrow, broad = (each.difference("a_ka", "ours", "base") for each in (items, wide))
    assert narrow.value == pytest.approx(broad.value) and narrow.clear
    assert broad.low == 0 and broad.high > 2 * narrow.high, "some draws lack the suite or the chain"
    assert wide.difference("a_ka", "ours", "base", without=["a"]).high == 0
    assert np.isfinite(wide.of("gm", without="abc")).all()


RNG = np.random.default_rng(0)
BASE: Hits = {name: (RNG.random(200) < 0.5).astype(float) for name in ("new", "old")}
NEW, OLD = BASE["new"].mean(), BASE["old"].mean()
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
    assert found["gm_lowest"] == pytest.approx(100 * (np.sqrt((NEW - 0.05) * OLD) - np.sqrt(NEW * OLD)), abs=0.01)
    assert "gm_sd" not in repeated(courses[:1], ASKED), "one chain has no spread"


ITEMS, DIM = 64, 6
SUITE = Suite(
    "car", "adaptation", "retrieval", tuple(replace(p, text=f"number {n}") for n, p in enumerate(pairs("car", ITEMS)))
)


def _unit(rows: np.ndarray) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _encoded(images: Vectors, texts: Vectors) -> Encoded:
    rows = zip(SUITE.items, images, texts, strict=True)
    both = [(pair.id, image, pair.text, text) for pair, image, text in rows]
    return Encoded({id_: image for id_, image, _, _ in both}, {words: text for _, _, words, text in both})


def test_a_map_takes_new_queries_into_an_index_of_a_space_that_was_turned() -> None:
    rng = np.random.default_rng(0)
    images = _unit(rng.normal(size=(ITEMS, DIM)))
    texts = _unit(images + 0.3 * rng.normal(size=(ITEMS, DIM)))
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    old, new = _encoded(images, texts), _encoded(images @ turn, texts @ turn)
    assert np.allclose(apply(turn.T, 3 * texts @ turn), texts, atol=1e-6)
    found = cross_version_recall([SUITE], old, new, old)
    assert found["old_old"] > 0.9
    assert found["new_at_1"] == found["mapped_at_1"] == pytest.approx(found["old_old"])
    assert found["new_at_0"] < 0.4 < found["new_at_0.5"] < found["old_old"]
    assert found["mapped_at_0"] == found["mapped_base"] == pytest.approx(found["old_old"])
    assert found["new_base"] == found["new_at_0"]


def test_a_search_in_the_old_index_is_a_plain_ranking_and_what_is_backfilled_stays_so() -> None:
    rng = np.random.default_rng(1)
    old, new = (_encoded(*(_unit(rng.normal(size=(ITEMS, DIM))) for _ in range(2))) for _ in range(2))
    right = 0
    for pair in SUITE.items:
        ranked = sorted(SUITE.items, key=lambda other: -float(new.texts[pair.text] @ old.images[other.id]))
        right += pair.id in [other.id for other in ranked[:5]]
    assert cross_version_recall([SUITE], old, new, old)["new_at_0"] == pytest.approx(right / ITEMS)
    done = [backfilled(41, share) for share in SHARES]
    assert [int(rows.sum()) for rows in done] == [0, 10, 20, 41]
    assert all((later | ~earlier).all() for earlier, later in pairwise(done))


def test_class_means_in_any_cut_and_order_are_those_of_all_samples() -> None:
    made = np.random.default_rng(0)
    centres = made.normal(size=(3, 8))
    rows = (centres[np.arange(60) % 3] + 2.0 * made.normal(size=(60, 8))) * made.uniform(0.5, 3, size=(60, 1))
    labels, unit = ["ant", "bee", "cat"] * 20, _unit(rows)
    whole, parts = NearestMean(), NearestMean()
    whole.update(rows, labels)
    for part in reversed(np.array_split(np.arange(60), 7)):
        parts.update(rows[part], [labels[row] for row in part])
    means = {name: unit[np.array(labels) == name].mean(axis=0) for name in whole.classes}
    plain = [min(means, key=lambda name, row=row: -row @ means[name] / np.linalg.norm(means[name])) for row in unit]
    assert set(plain) == {"ant", "bee", "cat"}
    assert whole.predict(rows) == parts.predict(rows) == plain
    assert np.allclose(parts.scores(rows), whole.scores(rows), rtol=0, atol=1e-12)
    for value in (0.0, np.nan, np.inf):
        with pytest.raises(TrainingError, match="not finite or 0"):
            parts.update(np.full((1, 8), value), ["ant"])
