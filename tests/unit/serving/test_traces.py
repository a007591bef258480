from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from core import request_context, tracing
from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import Serve
from core.settings.watching import Traces
from serving.engines.preprocess import Preprocess
from serving.http.image_loader import ImageLoader
from serving.messages import EncodeRequest, EncodeResult
from serving.ray.ray_session import tracing_environment
from serving.replicas.fair_batches import FairBatches
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_state, client, png

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", None)  # off again afterwards
    tracing.switch_on(provider)
    return exporter


@contextmanager
def traced(trace_id: str = TRACE, sampled: bool = True) -> Iterator[None]:
    """As Ray Serve does with a request that has a ``traceparent``."""
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-0{int(sampled)}"}
    token = context.attach(TraceContextTextMapPropagator().extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.parent is not None
    return trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.parent.span_id)


async def test_a_chat_with_an_image_has_its_intake_in_the_trace_of_its_client(spans: InMemorySpanExporter) -> None:
    with traced():
        async with client(app_state(ScriptedVlms())) as http:
            body = {"model": "vlm", "messages": about_image()}
            answer = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "r1"})
    assert answer.status_code == 200
    finished = spans.get_finished_spans()
    assert [span.name for span in finished] == ["intake", "inspect", "decode"]
    assert {ids(span) for span in finished} == {(TRACE, PARENT)}
    assert dict(finished[0].attributes or {}) == {"ratchet.request_id": "r1"}
    assert dict(finished[2].attributes or {}) == {
        "images": 1, "ratchet.request_id": "r1", "ratchet.release": 3, "ratchet.adapter": "vlm-b",
    }  # fmt: skip


async def test_requests_of_one_batch_have_each_their_own_queue_and_forward(spans: InMemorySpanExporter) -> None:
    async def run(requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        return [EncodeResult(np.zeros((1, 2), np.float32), each.adapter) for each in requests]

    batches = FairBatches(run, 64, 0.0)

    async def one(trace_id: str) -> None:
        with traced(trace_id):
            token = request_context.begin(trace_id[:4])
            request_context.note("clip-a")
            await batches.submit(EncodeRequest("text", [[1]], "clip-a", float("inf")))
            request_context.end(token)

    others = ["1" * 32, "2" * 32, "3" * 32]
    await asyncio.gather(*map(one, others))
    finished = spans.get_finished_spans()
    assert sorted((span.name, *ids(span)) for span in finished) == sorted(
        (name, each, PARENT) for name in ("queue", "forward") for each in others
    )
    for span in finished:
        attributes = dict(span.attributes or {})
        assert attributes["ratchet.adapter"] == "clip-a"
        assert attributes["ratchet.request_id"] == ids(span)[0][:4]
        assert span.name == "queue" or attributes["requests"] == 3
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time


async def test_a_request_that_is_not_sampled_has_no_spans_and_none_begins_a_trace(spans: InMemorySpanExporter) -> None:
    loader = ImageLoader(Preprocess(size=16), Serve())
    with traced(sampled=False):
        await loader.pixels([("image", png())])
        tracing.record("queue", 0.0, 1.0)
    await loader.pixels([("image", png())])
    assert spans.get_finished_spans() == ()


def test_where_it_is_off_nothing_of_opentelemetry_is_imported() -> None:
    program = (
        "import sys; from core.tracing import span, record\n"
        "with span('a', b=1): record('c', 0, 1)\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_ray_serve_is_told_in_the_words_that_it_reads() -> None:
    from ray._common.utils import import_attr
    from ray.serve._private import constants, tracing_utils

    settings = Settings(traces={"endpoint": "http://collector:4318/v1/traces", "share": 0.25})
    environment = tracing_environment(settings.traces)
    assert environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "http://collector:4318/v1/traces"
    rays = [name for name in environment if name.startswith("RAY_")]
    assert len(rays) == 2 and all(hasattr(constants, name) for name in rays)
    tracing_utils._validate_tracing_exporter(import_attr(environment["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"]))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigError, match=r"traces\.endpoint") as caught:
        tracing_environment(Traces(endpoint="http://collector:4318/v1/traces"))
    assert "ratchet-server[traces]" in caught.value.fix
