"""What `ratchet bench hostile` counts, and what its attackers send."""

from __future__ import annotations

import asyncio
import io
import json
import random

import pytest
from PIL import Image

from benchmarks import hostile_attacks as attacks
from benchmarks.hostile import Turn, figures, plan
from benchmarks.hostile_attacks import Target, bomb, request, sampling
from ops.load.traffic import Report, Sample


def test_requests_count_with_the_attack_that_they_overlap() -> None:
    samples = [
        Sample(0.0, 9.0, 0, "failed while it warmed up"),
        *(Sample(10.0 + n / 100, 0.1, 1) for n in range(100)),
        Sample(19.9, 0.3, 1),  # due before the attack, answered in it
        Sample(25.0, 0.2, 0, "503"),
        Sample(31.0, 0.1, 1),
    ]
    turns = [Turn("silent", 20.0, 30.0, {"closed": 3})]
    result = figures(Report(len(samples), 1, 0, (1,), tuple(samples)), turns, 10.0, 2**30)
    assert (result["good_requests"], result["good_failed"]) == (103, 1)
    assert result["p99_ratio"] == pytest.approx(3, rel=0.05)
    assert result["attacks"]["silent"]["good_failed"] == 1
    assert result["attacks"]["silent"]["answers"] == {"closed": 3}
    assert result["rss_max_gib"] == 1


def test_without_a_vlm_nothing_is_asked_of_it() -> None:
    assert set(plan(vlm=True)) - set(plan(vlm=False)) == {"fuzzed_sampling"}
    assert len(plan(vlm=True)) == 7


def test_a_bomb_is_a_small_file_of_many_pixels() -> None:
    data = bomb(4_000_000)
    assert len(data) < 40_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.mode) == ((2000, 2000), "RGBA")


def test_sampling_parameters_are_odd_and_always_the_same() -> None:
    first, second = random.Random(1), random.Random(1)
    made = [sampling(first) for _ in range(50)]
    assert made == [sampling(second) for _ in range(50)]
    assert all(len(body) > 3 and json.dumps(body) for body in made)


async def test_an_attacker_counts_answers_and_closed_connections() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/closed" not in head:
            writer.write(b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 4\r\n\r\nlate")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = int(server.sockets[0].getsockname()[1])
        target = Target("127.0.0.1", port)
        for path in ("/", "/closed"):

            async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str = path) -> str:
                writer.write(request(path))
                return await attacks.status(reader)

            await target.attempt(talk)
    await target.attempt(talk)
    assert target.counts == {"408": 1, "closed": 1, "refused": 1}
