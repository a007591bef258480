"""A release that changes the image space waits for indexes outside, if the settings say so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.ledger import Ledger
from core.ledger.rows import IndexRow
from serving.releases.preparation import IndexPolicy
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server

MEASURED = {"incumbent": None, "allowed": True}


async def served(ledger: Ledger, indexes: IndexPolicy = "wait", **options: Any) -> Server:
    for name in ("found", "other"):
        row = IndexRow(name=name, url="postgresql://db/a", source=name, id_field="id", image_field="image")
        ledger.add_index(row, actor="me")
    ledger.pause_index("other", True, actor="me")
    server = Server(ledger, PlainBroadcast(**options), indexes=indexes)
    await server.start()
    return server


async def test_a_release_waits_until_each_index_is_ready_and_says_so(ledger: Ledger) -> None:
    server = await served(ledger)
    release = asyncio.create_task(server.create(clip="a"))
    await until(lambda: server.preparation.waits_for)
    assert server.preparation.waits_for == ["found (not begun)"]
    ledger.set_index_space("found", "i-a", epoch=None, state="filling", rows=3, total=9)
    await until(lambda: server.preparation.waits_for == ["found (filling, 3 of 9 rows)"])
    assert server.live == (1, None, None)
    ledger.set_index_space("found", "i-a", epoch=None, state="ready")
    await release
    assert server.live == (2, "a", None) and not server.preparation.waits_for


async def test_a_pause_lets_the_release_go_on(ledger: Ledger) -> None:
    server = await served(ledger)
    release = asyncio.create_task(server.create(clip="a"))
    await until(lambda: server.preparation.waits_for)
    ledger.pause_index("found", True, actor="me")
    await release
    assert server.live == (2, "a", None)


async def test_a_rollback_stops_a_release_that_waits(ledger: Ledger) -> None:
    server = await served(ledger, "ignore")
    await server.create(clip="a")
    server.preparation.indexes = "wait"
    release = asyncio.create_task(server.create(clip="b"))
    await until(lambda: server.preparation.waits_for)
    await server.back()
    with pytest.raises(Exception, match="rolled back"):
        await release
    assert server.live == (3, None, None) and not server.preparation.waits_for


async def test_a_rollback_that_has_to_be_prepared_does_not_wait(ledger: Ledger) -> None:
    server = await served(ledger, "ignore")
    for name in ("a", "b", "c"):
        await server.create(clip=name)
    server.preparation.indexes = "wait"
    await server.back(to=2)
    assert server.live[1] == "a"


@pytest.mark.parametrize("spaces", [{(1, "a"): "i-None", (2, "a"): "i-None"}])
async def test_a_release_that_keeps_the_image_space_does_not_wait(ledger: Ledger, spaces: Any) -> None:
    server = await served(ledger, spaces=spaces)
    await asyncio.wait_for(server.create(clip="a"), 5)
    assert server.live == (2, "a", None)


async def test_ignored_indexes_do_not_delay(ledger: Ledger) -> None:
    server = await served(ledger, "ignore")
    await asyncio.wait_for(server.create(clip="a"), 5)
    assert server.live == (2, "a", None)


@pytest.mark.parametrize(
    ("measured", "waits"), [(MEASURED, False), ({**MEASURED, "allowed": False}, True), (None, True)]
)
async def test_cross_waits_only_where_the_gate_did_not_allow_old_vectors(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, measured: Any, waits: bool
) -> None:
    monkeypatch.setattr(ledger, "cross_version", lambda clip: measured)
    server = await served(ledger, "cross")
    release = asyncio.create_task(server.create(clip="a"))
    await until(lambda: server.preparation.waits_for or release.done())
    assert bool(server.preparation.waits_for) == waits
    ledger.set_index_space("found", "i-a", epoch=None, state="ready")
    await release
