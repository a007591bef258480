"""Encoding and searching: what is sent and compared, and the figures that come of it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.encode.figures import CellFigures, cell_figures, cpu_ms_per_request, ratios
from benchmarks.encode.generator import Inputs, Order, run
from benchmarks.encode.grid import Cell, Grid
from benchmarks.encode.payloads import HEIGHT, WIDTH, BodyTemplate, JpegInput, jpegs, text
from benchmarks.encode.peers.environment import DONE, Environment
from benchmarks.encode.sides import Turn
from benchmarks.search.catalog_side import NumberCorpus, id_of, number_of
from benchmarks.search.mixture import Mixture, map_rows, true_scores, write_rows
from serving.engines.tokens import BoundedTokenizer, vocabulary
from serving.messages import Modality


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


def test_texts_have_ten_to_sixteen_tokens_and_none_comes_twice() -> None:
    texts = [text(number) for number in (*range(500), *range(800_000, 800_500))]
    assert len(set(texts)) == len(texts)
    lengths = [len(row) for row in BoundedTokenizer(vocabulary(), 77).rows(texts)]
    assert min(lengths) >= 10 and max(lengths) <= 16


@asynccontextmanager
async def recording_server(refused: int = 0) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Answer 200 and close each second connection; the first ``refused`` requests get 429. Yields URL and bodies."""
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            bodies.append(json.loads(await reader.readexactly(length)))
            status = b"429 Too Many Requests" if len(bodies) <= refused else b"200 OK"
            last = len(bodies) % 2 == 0
            writer.write(
                b"HTTP/1.1 %s\r\nContent-Length: 2\r\n%s\r\n{}" % (status, b"Connection: close\r\n" if last else b"")
            )
            await writer.drain()
            if last:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/embeddings", bodies


def order(url: str, kind: Modality = "text", items: int = 3) -> Order:
    template = BodyTemplate('{"input":[', ('"', '"'), "]}")
    return Order(url, template, kind, items, concurrency=4, seconds=0.1)


async def test_the_load_sends_inputs_that_were_never_sent_and_counts_answers_with_their_time() -> None:
    async with recording_server() as (url, bodies):
        result = await run(order(url), Inputs(pictures=2))
    sent = [each for body in bodies for each in body["input"]]
    assert len(bodies) == len(result.latencies) >= 4 and len(sent) == 3 * len(bodies) == len(set(sent))
    assert result.failed == 0 and result.seconds >= 0.1
    assert all(latency > 0 for latency in result.latencies)


async def test_the_load_counts_refusals_and_says_what_they_were() -> None:
    async with recording_server(refused=2) as (url, _):
        result = await run(order(url, kind="image", items=1), Inputs(pictures=2))
    assert result.failed == 2 and result.latencies
    assert result.problems == ["429 {}", "429 {}"]


def turn(rate: float, outside_ms: float | None = None) -> Turn:
    return Turn(int(rate * 10), 0, 10.0, 0.1, 0.2, outside_ms=outside_ms)


def model_cells() -> list[CellFigures]:
    rates: dict[Cell, tuple[float, float, float]] = {
        Cell("image", 1, 8): (30, 10, 60),
        Cell("image", 1, 32): (40, 10, 50),
        Cell("image", 16, 1): (3, 1.5, 4),
        Cell("image", 16, 8): (3.6, 1.2, 4),
        Cell("text", 16, 1): (10, 5, 20),
    }
    return [
        cell_figures("ViT-B-32", cell, {"ratchet": [turn(ours, 2.5)], "infinity": [turn(theirs)], "raw": [turn(raw)]})
        for cell, (ours, theirs, raw) in rates.items()
    ]


def test_ratios_are_the_worst_over_the_cells_they_are_about() -> None:
    assert ratios(model_cells()) == {
        "image_to_infinity_min": 2.0, "text_to_infinity_min": 2.0, "image_to_mosec_min": None,
        "text_to_mosec_min": None, "image_16_to_raw": 0.75, "image_c32_to_raw": 0.8, "text_16_to_raw": 0.5,
    }  # fmt: skip
    assert cpu_ms_per_request(model_cells()) == 2.5


def test_a_side_is_shown_by_the_median_of_its_rounds() -> None:
    row = cell_figures("m", Cell("text", 16, 1), {"ratchet": [turn(2), turn(30), turn(4)], "raw": []})
    assert row.sides.keys() == {"ratchet"}
    assert (row.sides["ratchet"]["requests_per_second"], row.sides["ratchet"]["items_per_second"]) == (4, 64)
    assert row.ratio("raw") is None
    raw = Turn(10, 0, 1.0, float("nan"), float("nan"))
    of_raw = cell_figures("m", Cell("text", 1, 1), {"raw": [raw]}).to_json()
    assert of_raw["sides"]["raw"]["p50"] is None, "JSON has no NaN"


def test_an_environment_is_made_once_and_another_one_for_other_requirements(tmp_path: Path) -> None:
    one, other = Environment("peer", ("a==1",)), Environment("peer", ("a==2",))
    assert one.folder(tmp_path) != other.folder(tmp_path)
    one.folder(tmp_path).mkdir(parents=True)
    (one.folder(tmp_path) / DONE).touch()
    assert one.ensure(tmp_path) == one.folder(tmp_path) / "bin" / "python"


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
