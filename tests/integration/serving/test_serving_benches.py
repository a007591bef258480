"""Small runs of the serving benchmarks on the server of the other tests, with real processes for the load and the
model.
"""

from __future__ import annotations

import pytest

from benchmarks import soak
from benchmarks.encode.figures import cpu_ms_per_request, ratios
from benchmarks.encode.grid import Grid, cells
from benchmarks.encode.peers.servers import openai_template
from benchmarks.encode.run_encode import measure
from benchmarks.encode.sides import HttpSide, RawSide, check, ratchet_side
from benchmarks.line_worker import LineWorker
from benchmarks.swap import Swaps
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = [pytest.mark.integration, pytest.mark.long]


def test_embeddings_are_measured_beside_the_model_alone(server: ServerFixture) -> None:
    grid = Grid(cells(concurrencies=[2]), rounds=1, seconds=0.2)
    with (
        LineWorker("benchmarks.encode.generator") as generator,
        LineWorker("benchmarks.encode.raw", str(server.config)) as worker,
    ):
        ratchet, raw = ratchet_side(server.settings, generator), RawSide(worker, server.settings.serve.max_batch)
        with server.client() as client:
            client.release(None, reason="the base alone")
        unable: dict[str, str] = {}
        deaf = HttpSide("deaf", lambda kind: f"{server.settings.serve.url}/v1/{kind}", openai_template, generator)
        least = check(ratchet, [deaf], server.base, unable)
        assert unable.keys() == {"deaf, image", "deaf, text"} and not deaf.kinds()
        rows, _ = measure([ratchet, raw], grid, "tiny", server.pids)
        assert raw.describe().keys() == {"engine", "precision"}
    assert least.keys() == {"ratchet_image", "ratchet_text"}
    assert [(row.cell.kind, row.cell.items) for row in rows] == [
        ("image", 1), ("image", 16), ("text", 1), ("text", 16),
    ]  # fmt: skip
    for row in rows:
        assert row.sides["ratchet"]["failed"] == 0, row
        assert row.ratio("raw") is not None
    worst = ratios(rows)
    assert worst["image_16_to_raw"] is not None and worst["image_to_infinity_min"] is None
    assert cpu_ms_per_request(rows) is not None


def test_a_soak_sees_no_failure_and_measures_each_process(server: ServerFixture) -> None:
    swaps = Swaps([server.adapter(), server.adapter()], [])
    figures = soak.measure(
        server.settings, server.url, swaps, server.images, (), seconds=4.0, every=0.5, warm_seconds=1.0, share=0.5,
        capacity_seconds=1.0,
    )  # fmt: skip
    assert (figures["failed"], figures["mixed"]) == (0, 0), figures
    assert figures["swaps"] == 8 and figures["rollbacks"] == 2
    assert figures["requests"] > 0 and figures["processes"] >= 5
    assert figures["processes_ended"] == []
