"""Backward maps against plain references, and what they are for: new queries in an old index."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.continual.backward_map import (
    SHARES,
    BackwardMap,
    Index,
    composed,
    fit,
    recall,
    recall_while_backfilling,
)
from core.errors import TrainingError

DIM = 8


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def features(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def rotation(seed: int, dim: int = DIM) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def test_procrustes_takes_a_turned_space_back_exactly() -> None:
    old, turn = features(40), rotation(1)
    back = fit(old @ turn, old, "procrustes")
    assert np.allclose(back.matrix, turn.T, atol=1e-12)
    unseen = features(20, seed=2)
    assert np.allclose(back.apply(unseen @ turn), unseen, atol=1e-6)


def test_procrustes_is_the_best_of_many_rotations() -> None:
    old = features(30)
    new = unit(old @ rotation(1) + 0.3 * np.random.default_rng(5).normal(size=old.shape))
    back = fit(new, old, "procrustes")
    assert np.allclose(back.matrix @ back.matrix.T, np.eye(DIM), atol=1e-12)
    error = np.linalg.norm(new @ back.matrix - old)
    near = [back.matrix @ _small_turn(seed) for seed in range(50)]
    assert all(np.linalg.norm(new @ other - old) >= error for other in near)


def _small_turn(seed: int) -> np.ndarray:
    skew = 0.1 * np.random.default_rng(seed).normal(size=(DIM, DIM))
    skew = skew - skew.T
    return np.linalg.solve(np.eye(DIM) + skew, np.eye(DIM) - skew)  # Cayley: orthogonal


def _descended(new: np.ndarray, old: np.ndarray, ridge: float) -> np.ndarray:
    """|new B - old|² / n + ridge |B|², by plain gradient descent."""
    matrix = np.zeros((new.shape[1], old.shape[1]))
    for _ in range(20_000):
        matrix -= 0.5 * (new.T @ (new @ matrix - old) / len(new) + ridge * matrix)
    return matrix


@pytest.mark.parametrize("dims", [(8, 8), (6, 8), (8, 5)])
def test_ridge_is_the_minimum_that_descent_finds(dims: tuple[int, int]) -> None:
    new, old = features(30, dims[0], seed=3), features(30, dims[1], seed=4)
    back = fit(new, old, "ridge", ridge=0.01)
    assert back.matrix.shape == dims
    assert np.allclose(back.matrix, _descended(new, old, 0.01), atol=1e-8)


def test_ridge_takes_any_invertible_change_back() -> None:
    old = features(200)
    change = rotation(1) @ np.diag(np.linspace(0.5, 2, DIM))
    new = unit(old @ change)
    mapped = fit(new, old, "ridge", ridge=1e-9).apply(new)
    turned = fit(new, old, "procrustes").apply(new)
    assert _cosines(mapped, old).mean() > 0.99 > _cosines(turned, old).mean()


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((one * other).sum(axis=1))


def test_maps_of_several_releases_compose() -> None:
    first = features(50)
    turns = [rotation(seed) for seed in (1, 2, 3)]
    spaces = [first]
    for turn in turns:
        spaces.append(spaces[-1] @ turn)
    maps = [fit(new, old, "procrustes") for old, new in itertools.pairwise(spaces)]
    whole = composed(maps[::-1])
    assert np.allclose(whole.apply(spaces[-1]), first, atol=1e-6)
    with pytest.raises(TrainingError, match="does not meet"):
        BackwardMap(np.eye(4)).then(maps[0])
    with pytest.raises(TrainingError, match="no backward map"):
        composed([])


def test_a_map_survives_its_file(tmp_path: Path) -> None:
    back = fit(features(20, 6), features(20, seed=1))
    back.save(tmp_path / "maps" / "2.safetensors")
    assert np.array_equal(BackwardMap.load(tmp_path / "maps" / "2.safetensors").matrix, back.matrix)
    (tmp_path / "broken").write_bytes(b"no map")
    for name in ("broken", "absent"):
        with pytest.raises(TrainingError, match="no backward map"):
            BackwardMap.load(tmp_path / name)


def test_recall_equals_the_plain_ranking() -> None:
    queries, rows = features(15), features(40, seed=1)
    right = np.random.default_rng(2).random((15, 40)) < 0.1
    right[:, 0] = True
    hits = 0
    for number, query in enumerate(queries.tolist()):
        scores = [sum(a * b for a, b in zip(query, row, strict=True)) for row in rows.tolist()]
        hits += any(right[number, i] for i in sorted(range(40), key=lambda i: -scores[i])[:3])
    assert 0 < hits < 15
    assert recall(queries, rows, right, 3) == pytest.approx(hits / 15)
    assert recall(queries, np.ones((40, DIM)), right, 3) == 0, "what is all alike finds nothing"


def test_with_the_map_recall_holds_while_the_index_is_backfilled_and_without_it_does_not() -> None:
    images, turn = features(200), rotation(1)
    texts = unit(images + 0.1 * np.random.default_rng(3).normal(size=images.shape))
    right = np.eye(200, dtype=bool)
    index = Index(old=images, new=images @ turn)
    queries = texts @ turn
    old = recall(texts, images, right, 5)
    back = fit(index.new[:50], index.old[:50], "procrustes")
    held = recall_while_backfilling(queries, index, right, back=back)
    lost = recall_while_backfilling(queries, index, right)
    assert list(held) == list(SHARES)
    assert old > 0.9
    assert all(value == pytest.approx(old, abs=0.01) for value in held.values())
    assert lost[0.0] < 0.2 < lost[0.5] < lost[1.0] == held[1.0]


def test_what_is_backfilled_stays_backfilled() -> None:
    index = Index(old=features(41), new=features(41))
    done = [index.backfilled(share) for share in SHARES]
    assert [int(rows.sum()) for rows in done] == [0, 10, 20, 41]
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(done))


@pytest.mark.parametrize(
    ("new", "old", "method", "ridge", "named"),
    [
        (np.ones((3, 4)), np.ones((2, 4)), "ridge", 1e-3, "no pairs"),
        (np.ones((0, 4)), np.ones((0, 4)), "ridge", 1e-3, "no pairs"),
        (np.full((3, 4), np.nan), np.ones((3, 4)), "ridge", 1e-3, "not finite"),
        (np.ones((3, 4)), np.ones((3, 5)), "procrustes", 1e-3, "procrustes maps 4"),
        (np.ones((3, 4)), np.ones((3, 4)), "ridge", 0.0, "ridge 0"),
        (np.ones((3, 4)), np.ones((3, 4)), "affine", 1e-3, "affine"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    new: np.ndarray, old: np.ndarray, method: str, ridge: float, named: str
) -> None:
    with pytest.raises(TrainingError, match=named):
        fit(new, old, method, ridge)  # type: ignore[arg-type]
