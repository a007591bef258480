"""Encoding and searching: what is sent and compared, and the figures that come of it."""

from __future__ import annotations

import base64
import io
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.encode.figures import cell_figures
from benchmarks.encode.grid import Cell, Grid
from benchmarks.encode.payloads import HEIGHT, WIDTH, JpegInput, jpegs
from benchmarks.encode.sides import Turn
from benchmarks.search.catalog_side import NumberCorpus, id_of, number_of
from benchmarks.search.mixture import Mixture, map_rows, true_scores, write_rows


def test_sides_take_turns_with_batches_as_large_as_the_server_could_make_them() -> None:
    assert [Cell("image", 1, level).batch(16) for level in (1, 8, 128)] == [1, 8, 16]
    assert [Cell("text", 16, level).batch(16) for level in (1, 8)] == [16, 64]
    assert Cell("image", 16, 1).batch(max_batch=8) == 16, "a request is not smaller than itself"
    cell = Cell("text", 1, 1)
    turns = Grid((cell,), rounds=2, seconds=1).turns(["a", "b"])
    assert list(turns) == [(cell, side) for side in "abba"], "the order changes from round to round"


def test_pictures_weigh_what_photographs_do_and_have_other_bytes_each_time_with_the_same_pixels() -> None:
    pictures = jpegs(3)
    assert len(set(pictures)) == 3
    assert all(75_000 < len(each) < 100_000 for each in pictures), [len(each) for each in pictures]
    original = JpegInput(pictures[0])
    sent = [base64.b64decode(b"".join(original.numbered(number))) for number in (1, 2)]
    assert len({sha256(each).digest() for each in (original.jpeg, *sent)}) == 3
    pixels = [np.asarray(Image.open(io.BytesIO(each))) for each in (original.jpeg, *sent)]
    assert pixels[0].shape == (HEIGHT, WIDTH, 3)
    assert all(np.array_equal(pixels[0], each) for each in pixels[1:])


def turn(rate: float, outside_ms: float | None = None) -> Turn:
    return Turn(int(rate * 10), 0, 10.0, 0.1, 0.2, outside_ms=outside_ms)


def test_a_side_is_shown_by_the_median_of_its_rounds() -> None:
    row = cell_figures("m", Cell("text", 16, 1), {"ratchet": [turn(2), turn(30), turn(4)], "raw": []})
    assert row.sides.keys() == {"ratchet"}
    assert (row.sides["ratchet"]["requests_per_second"], row.sides["ratchet"]["items_per_second"]) == (4, 64)
    assert row.ratio("raw") is None
    raw = Turn(10, 0, 1.0, float("nan"), float("nan"))
    of_raw = cell_figures("m", Cell("text", 1, 1), {"raw": [raw]}).to_json()
    assert of_raw["sides"]["raw"]["p50"] is None, "JSON has no NaN"


def test_rows_to_search_are_the_same_each_time_with_near_neighbours_among_many_far_ones(tmp_path: Path) -> None:
    mixture = Mixture(dimensions=64, clusters=20)
    write_rows(mixture, tmp_path / "rows", 2000)
    rows = map_rows(tmp_path / "rows", 64)
    assert rows.shape == (2000, 64) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.array_equal(rows[:100], next(mixture.rows(100)))
    similar = np.sort(rows[:50] @ rows.T, axis=1)
    assert similar[:, -11].mean() > 3 * abs(similar[:, 1000].mean()) + 0.2
    queries = mixture.queries(7)
    assert not np.isin(queries[:, 0], rows[:, 0]).any(), "queries are in no index"
    expected = -np.sort(-(queries @ rows.T), axis=1)[:, :10]
    assert np.allclose(true_scores(rows, queries), expected, atol=1e-6)


def test_ids_of_rows_look_like_digests_and_lead_back() -> None:
    assert [number_of(id_of(number)) for number in (0, 1, 10**6)] == [0, 1, 10**6] and len(id_of(1)) == 64
    corpus = NumberCorpus()
    corpus.rows = 5
    assert corpus.scan(5, after={"t:0": 3}, columns=["id"])["id"].to_pylist() == [id_of(3), id_of(4)]
