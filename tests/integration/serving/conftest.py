"""One server for all serving tests: starting Ray takes 20 s. Tests leave it running, whatever is live.

Where Ray plays no part, the same application in this process does (:mod:`tests.support.in_process_app`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from ops.settings import Serve
from tests.integration.serving.server_fixture import House
from tests.support.in_process_app import Edge, open_edge


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House.make(tmp_path_factory.mktemp("house"))
    house.add_samples(24, domain="cats", source="zoo", year=2023)
    house.add_samples(16, domain="maps", source="atlas", year=2024)
    try:
        yield house
    finally:
        house.stop()


@pytest.fixture
def house(shared_house: House) -> House:
    """The shared server, started again if a test before ended it."""
    if shared_house.process is None or shared_house.process.poll() is not None:
        shared_house.start()
    return shared_house


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop that the application in this process lives in."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="session")
def edge(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Edge, FastAPI]:
    """The application without Ray, with small bounds."""
    bounds = Serve(max_images=3, max_pixels=100_000, max_image_bytes=100_000, max_texts=8, max_text_chars=200)
    return runner.run(open_edge(tmp_path_factory.mktemp("edge"), bounds))
