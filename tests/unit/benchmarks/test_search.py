from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.search.catalog_side import NumberCorpus, id_of, number_of
from benchmarks.search.mixture import Mixture, map_rows, true_scores, write_rows

DIM = 64


def small() -> Mixture:
    return Mixture(dimensions=DIM, clusters=20)


def test_vectors_are_the_same_each_time_and_of_unit_length(tmp_path: Path) -> None:
    write_rows(small(), tmp_path / "rows", 1500)
    rows = map_rows(tmp_path / "rows", DIM)
    assert rows.shape == (1500, DIM)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(rows[:100], next(small().rows(100)))


def test_a_row_has_near_neighbours_and_most_rows_are_far() -> None:
    rows = next(small().rows(2000))
    similar = np.sort(rows[:50] @ rows.T, axis=1)
    assert similar[:, -11].mean() > 3 * abs(similar[:, 1000].mean()) + 0.2


def test_true_scores_are_those_of_the_whole_product() -> None:
    mixture = small()
    rows, queries = next(mixture.rows(300)), mixture.queries(7)
    assert not np.isin(queries[:, 0], rows[:, 0]).any(), "queries are in no index"
    expected = -np.sort(-(queries @ rows.T), axis=1)[:, :10]
    assert np.allclose(true_scores(rows, queries), expected, atol=1e-6)


def test_ids_look_like_digests_and_lead_back() -> None:
    assert {number_of(id_of(number)) for number in range(50)} == set(range(50))
    assert all(len(id_of(number)) == 64 for number in (0, 1, 10**6))
    corpus = NumberCorpus()
    corpus.rows = 5
    assert corpus.scan(5, after={"t:0": 3}, columns=["id"])["id"].to_pylist() == [id_of(3), id_of(4)]
