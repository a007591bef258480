"""One server for all tests of serving and of the console: starting Ray and a VLM takes a minute, and a processor for
much of it. Tests leave it running with any release live.

Only one server runs at a time (:meth:`ServerFixture.start`). ``test_trials`` has to start it again, and gives it the
guard that trials need. Tests of the HTTP application that need no Ray use it in their process
(:mod:`tests.support.in_process_app`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.otlp_collector import OtlpCollector
from tests.integration.serving.server_fixture import ServerFixture


@pytest.fixture(scope="package", autouse=True)
def vllm_cache() -> Iterator[None]:
    """vLLM computes for 10 s what a model's class can do, in a further process, unless it finds that in its cache: that
    of tests outlives their homes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(Path(sys.prefix) / "vllm-cache"))
        yield


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as listening:
        yield listening


@pytest.fixture(scope="session")
def shared_server(collector: OtlpCollector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server with a CLIP and a VLM, on vLLM where that is installed; not started yet."""
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    server = ServerFixture.make_with_movable_ledger(tmp_path_factory.mktemp("server"), vlm_engine=engine)
    server.configure(traces={"endpoint": collector.url, "share": 0})
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
