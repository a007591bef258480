"""One server for all serving tests, because starting Ray takes 20 s. Tests leave it running with any release live.

Only one server runs at a time (:meth:`ServerFixture.start`), so modules that share one are next to each other by name;
``test_termination`` has to start the server, and gives it the guard that ``test_trials`` needs. Tests that need no Ray
use the same application in this process (:mod:`tests.support.in_process_app`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from core.settings.serving import Serve
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.in_process_app import MAX_IMAGE_BYTES, InProcessApp, open_in_process_app

ROLLOUT = {
    "mode": "canary", "share": 0.1, "observe_seconds": 1, "min_comparisons": 30, "guard_seconds": 60,
    "compare_share": 1.0, "hold_after_rollback": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    server = ServerFixture.make_with_movable_ledger(tmp_path_factory.mktemp("server"))
    server.add_samples(24, domain="cats", source="zoo", year=2023)
    server.add_samples(16, domain="maps", source="atlas", year=2024)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(shared_server: ServerFixture) -> ServerFixture:
    """The shared server, started again if an earlier test ended it."""
    shared_server.ensure_running()
    return shared_server


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="session")
def in_process_app(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[InProcessApp, FastAPI]:
    bounds = Serve(max_pixels=400_000, max_image_bytes=MAX_IMAGE_BYTES)
    return runner.run(open_in_process_app(tmp_path_factory.mktemp("in_process_app"), bounds))
