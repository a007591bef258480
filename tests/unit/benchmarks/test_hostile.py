from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from PIL import Image

from benchmarks import hostile_attacks as attacks
from benchmarks.hostile import Turn, figures, plan, rollback_figures
from benchmarks.hostile_attacks import Target, bomb, request, sampling
from demo.load.traffic import CheckedSample, Report


def figures_of(samples: list[CheckedSample], turn: Turn, began: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the whole run, and of the one attack."""
    found = figures(Report(len(samples), 1, 0, (1,), tuple(samples)), [turn], began, 2**29, 2**30)
    return found, found["attacks"][turn.name]


def test_requests_and_rollbacks_count_with_the_attack_that_they_overlap() -> None:
    samples = [
        CheckedSample(0.0, 9.0, 0, "failed while it warmed up"),
        *(CheckedSample(10.0 + n / 100, 0.1, 1) for n in range(100)),
        CheckedSample(19.9, 0.3, 1),  # due before the attack, answered in it
        CheckedSample(25.0, 0.2, 0, "503"),
        CheckedSample(31.0, 0.1, 1),
    ]
    whole, attack = figures_of(samples, Turn("silent", 20.0, 30.0, {"closed": 3}), 10.0)
    assert (whole["good_requests"], whole["good_failed"]) == (103, 1)
    assert whole["p99_ratio"] == pytest.approx(3, rel=0.05)
    assert (attack["good_failed"], attack["answers"]) == (1, {"closed": 3})
    assert (whole["rss_quiet_gib"], whole["rss_max_gib"], whole["rss_ratio"]) == (0.5, 1, 2)
    turns = [Turn("silent", 20.0, 30.0, {}), Turn("bombs", 40.0, 50.0, {})]
    back = rollback_figures([(10.0, 0.2), (19.9, 0.4), (25.0, 0.1)], ["rollback: 503"], turns)
    assert (back["rollbacks"], back["rollbacks_failed"], back["rollback_seconds_max"]) == (3, 1, 0.4)
    assert back["rollback_seconds"] == {"silent": 0.4, "bombs": None}


def test_a_stall_is_the_time_between_two_good_answers() -> None:
    answered = [CheckedSample(n / 10, 0.05, 1) for n in (0, 1, 2, 9, 10)]
    samples = [*answered[:3], CheckedSample(0.5, 0.05, 0, "503"), *answered[3:]]
    for found in figures_of(samples, Turn("silent", 0.8, 0.97, {}), 0.0):
        assert found["stall_seconds_max"] == pytest.approx(0.7)


def test_without_a_vlm_nothing_is_asked_of_it() -> None:
    of_vlm = {"fuzzed_sampling", "metadata", "abandoned_chats", "large_pictures"}
    assert set(plan(vlm=True)) - set(plan(vlm=False)) == of_vlm
    assert len(plan(vlm=True)) == 15


def test_what_attackers_send_is_odd_and_the_same_again_and_no_small_picture_comes_twice() -> None:
    data = bomb(4_000_000)
    assert len(data) < 40_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.mode) == ((2000, 2000), "RGBA")
    first, second = ([sampling(drawn) for _ in range(50)] for drawn in (random.Random(1), random.Random(1)))
    assert first == second and all(len(body) > 3 and json.dumps(body) for body in first)
    made = {attacks._small_picture() for _ in range(20)}
    assert len(made) == 20
    with Image.open(io.BytesIO(base64.b64decode(made.pop().split(",")[1]))) as image:
        assert (image.size, image.mode, image.format) == ((16, 16), "RGB", "BMP")


@pytest.mark.parametrize(
    ("attack", "path", "size"),
    [
        (attacks.wrong_labels, "/v1/classify", 4 * 2**20),
        (attacks.unknown_keys, "/v1/embeddings", 3_000_000),
        (attacks.metadata, "/v1/chat/completions", 16 * 2**20),
        (attacks.many_small_images, "/v1/embeddings", 35_000),
        (attacks.large_pictures, "/v1/chat/completions", 400_000),
        (attacks.abandoned_chats, "/v1/chat/completions", 18_000),
    ],
)
async def test_an_attack_sends_json_of_its_size(attack: Any, path: str, size: int) -> None:
    came: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
        came.put_nowait((head, await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        target = Target("127.0.0.1", int(server.sockets[0].getsockname()[1]), max_pixels=40_000_000)
        attacking = asyncio.create_task(attack(target, connections=3))
        bodies = []
        for _ in range(3):
            head, body = await asyncio.wait_for(came.get(), 60)
            assert path.encode() in head.split(b"\r\n")[0]
            bodies.append(body)
        attacking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await attacking
    assert max(map(len, bodies)) == pytest.approx(size, rel=0.5)
    if attack is not attacks.metadata:  # nested deeper than this parser goes
        assert all(json.loads(body) for body in bodies)


async def test_an_attacker_counts_answers_and_closed_connections() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/closed" not in head:
            writer.write(b"HTTP/1.1 408 Request Time-out\r\nContent-Length: 4\r\n\r\nlate")
        writer.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str = "/") -> str:
        writer.write(request(path))
        return await attacks.status(reader)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        target = Target("127.0.0.1", int(server.sockets[0].getsockname()[1]))
        await target.attempt(talk)
        await target.attempt(partial(talk, path="/closed"))
    await target.attempt(talk)
    assert target.counts == {"408": 1, "closed": 1, "refused": 1}


@pytest.mark.parametrize("ticks", range(4))
async def test_an_attack_ends_when_it_is_over_also_where_an_answer_comes_at_that_moment(ticks: int) -> None:
    reading = asyncio.StreamReader()

    class Fake(Target):
        async def attempt(self, talk: Any) -> None:
            await talk(reading, AsyncMock(write=Mock()))

    attack = asyncio.create_task(attacks.cancelled_requests(Fake("", 0), 1, vlm=True))
    while reading._waiter is None:
        await asyncio.sleep(0)
    reading.feed_data(b"a token")
    for _ in range(ticks):
        await asyncio.sleep(0)
    attack.cancel()
    done, _ = await asyncio.wait([attack], timeout=5)
    assert done
