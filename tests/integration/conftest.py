"""The server with a VLM, shared by the tests of serving and of the console because it takes a minute to start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from benchmarks.otlp_collector import OtlpCollector
from tests.integration.serving.server_fixture import ServerFixture


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as listening:
        yield listening


@pytest.fixture(scope="session")
def shared_vlm_server(collector: OtlpCollector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server with a VLM, on vLLM where it is installed; not started yet."""
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    server = ServerFixture.make(tmp_path_factory.mktemp("vlm-server"), vlm_engine=engine, encoder_replicas=1)
    server.configure(traces={"endpoint": collector.url, "share": 0})
    server.add_samples(8)
    try:
        yield server
    finally:
        server.stop()
