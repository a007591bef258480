"""The server with a VLM, for tests of serving and of the console: to start it takes a minute."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from benchmarks.otlp_collector import OtlpCollector
from tests.integration.serving.server_fixture import ServerFixture


@pytest.fixture(scope="session")
def collector() -> Iterator[OtlpCollector]:
    """What servers with a VLM send the spans of sampled requests to."""
    with OtlpCollector() as listening:
        yield listening


@pytest.fixture(scope="session")
def shared_vlm_server(collector: OtlpCollector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server with a VLM, by vLLM where it is installed; not started yet."""
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    server = ServerFixture.make(tmp_path_factory.mktemp("vlm-server"), vlm_engine=engine, encoder_replicas=1)
    server.configure(traces={"endpoint": collector.url, "share": 0})
    server.add_samples(8)
    try:
        yield server
    finally:
        server.stop()
