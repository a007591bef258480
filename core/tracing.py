"""OpenTelemetry spans of requests: off unless Ray Serve was told to trace (``traces.endpoint``). Ray Serve accepts a
client's W3C ``traceparent``, carries the trace through its handles, and makes a span of each replica call. Ratchet adds
``intake``, ``inspect`` and ``decode`` in the ingress, ``queue`` and ``forward`` in the encoder, ``search`` in the
catalog and ``engine`` in the VLM. OpenTelemetry (the extra ``traces``) is only imported when on."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from core.request_context import current

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Tracer, TracerProvider

EXPORTER: Final = "core.tracing:span_processors"
_NOTHING: Final[AbstractContextManager[Any]] = nullcontext()
_tracer: Tracer | None = None


def span_processors() -> list[SpanProcessor]:
    """Enable spans in this process. Returns the processor that sends them by OTLP over HTTP, configured by OTEL_*
    variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    switch_on()
    return [BatchSpanProcessor(OTLPSpanExporter())]


def switch_on(provider: TracerProvider | None = None) -> None:
    global _tracer
    from opentelemetry import trace

    _tracer = trace.get_tracer("ratchet", tracer_provider=provider)


def span(name: str, **attributes: Any) -> AbstractContextManager[Any]:
    """A span around a block, if tracing is on and sampled, with release, adapter and ID of the request."""
    if _tracer is None or not _sampled():
        return _NOTHING
    return _tracer.start_as_current_span(name, attributes=attributes | _of_request())


def record(name: str, began: float, ended: float, **attributes: Any) -> None:
    """Record a finished span; times are on the monotonic clock."""
    if _tracer is None or not _sampled():
        return
    offset = time.time() - time.monotonic()
    start, end = (int((moment + offset) * 1e9) for moment in (began, ended))
    _tracer.start_span(name, start_time=start, attributes=attributes | _of_request()).end(end)


def _sampled() -> bool:
    """True if a caller wants this trace: without a parent a span would start its own."""
    from opentelemetry import trace

    return bool(trace.get_current_span().get_span_context().trace_flags.sampled)


def _of_request() -> dict[str, Any]:
    request = current()
    if request is None:
        return {}
    fields = {"request_id": request.request_id, "release": request.release, "adapter": request.adapter}
    return {f"ratchet.{name}": value for name, value in fields.items() if value not in (None, "")}
