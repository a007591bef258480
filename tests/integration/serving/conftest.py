"""The HTTP application in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from core.settings.serving import Serve
from tests.support.in_process_app import MAX_IMAGE_BYTES, InProcessApp, open_in_process_app


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="session")
def in_process_app(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[InProcessApp, FastAPI]:
    bounds = Serve(max_pixels=400_000, max_image_bytes=MAX_IMAGE_BYTES)
    return runner.run(open_in_process_app(tmp_path_factory.mktemp("in_process_app"), bounds))
