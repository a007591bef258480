"""When an ingress replica is ready for requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.http import ingress as module
from serving.http.ingress import Ingress


class Idle:
    """Shadow traffic that never compares, and probes that never ask."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    watch = run

    @property
    def probes(self) -> Idle:
        return self

    state = probes


def starting(monkeypatch: pytest.MonkeyPatch, refresh: Any) -> Any:
    replica: Any = object.__new__(Ingress)
    replica._tasks, replica.vlms = {}, None
    replica.shadow_traffic, replica.http_app = Idle(), Idle()
    monkeypatch.setattr(replica, "refresh", refresh)
    for name in ("_follow", "_read_keys"):
        monkeypatch.setattr(replica, name, Idle().run)
    return replica


async def test_it_is_not_healthy_before_it_knows_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()
    count = 0

    async def refresh() -> None:
        nonlocal count
        count += 1
        asked.set()
        await answered.wait()

    replica = starting(monkeypatch, refresh)
    health = asyncio.create_task(replica.check_health())
    await asked.wait()
    assert not health.done()
    answered.set()
    await health
    await replica.check_health()
    assert count == 1  # from now on it follows


async def test_it_starts_without_that_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    replica = starting(monkeypatch, asyncio.Event().wait)
    await replica.check_health()
    assert "follow" in replica._tasks
