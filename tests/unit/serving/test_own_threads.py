from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, cast

import pytest

from core.settings import Settings
from core.settings.serving import Serve
from serving.http.clip_vectors import ClipVectors
from serving.http.store_services import DeletionService, QuarantineService
from serving.own_threads import OwnThreads
from serving.releases.residency import ResidencyRows
from serving.replicas.follower import ResidencyFollower, ResidencyReader

ROWS = ResidencyRows((), None, ())


def deletions() -> Awaitable[Any]:
    ledger = cast(Any, SimpleNamespace(deletions=lambda *_: []))
    return DeletionService(Settings(), ledger).newest(5, None)


def quarantine(monkeypatch: pytest.MonkeyPatch) -> Awaitable[Any]:
    monkeypatch.setattr("streams.ingest.resubmit.list_quarantine", lambda *_: [])
    return QuarantineService(Settings(), cast(Any, None)).newest(5, None, None)


def reading() -> Awaitable[Any]:
    unused = cast(Any, None)
    return ResidencyReader(lambda: ROWS, unused, unused).read()


def following() -> Awaitable[Any]:
    async def load(_: ResidencyRows) -> list[Any]:
        return []

    return ResidencyFollower("encoder", lambda: ROWS, load, lambda _: None).step()


def heads() -> Awaitable[Any]:
    head = cast(Any, SimpleNamespace(classify=lambda _: "answers"))
    unused = cast(Any, None)
    return ClipVectors(unused, unused, unused, Serve()).classify(head, unused)


@pytest.mark.parametrize("purpose", [deletions, quarantine, reading, following, heads])
async def test_each_purpose_runs_while_the_threads_of_others_wait(
    purpose: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    pool.submit(over.wait, 60)
    try:
        await asyncio.wait_for(purpose(monkeypatch) if purpose is quarantine else purpose(), 60)
    finally:
        over.set()


async def test_a_call_sees_the_context_of_its_task() -> None:
    request: ContextVar[str] = ContextVar("request")
    request.set("r1")
    assert await OwnThreads("test").run(request.get) == "r1"
