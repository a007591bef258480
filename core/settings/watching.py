"""Settings of observability: drift, logs, traces."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from core.settings.section import Section, http_url


class Watch(Section):
    """Measurements of the catalog and of the incoming data."""

    seconds: float = Field(30.0, gt=0, description="How often they are measured, where something has changed.")
    drift_window: int = Field(
        128, ge=8, le=100_000, description="Newest samples that are compared, for drift, to four times as many before."
    )


class Logs(Section):
    """Logs of the processes, on standard error."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="One JSON object a line, or text; auto: text at a terminal, JSON elsewhere."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level of Ratchet's own records; libraries log warnings and worse."
    )


class Traces(Section):
    """Spans of requests to the model server, for OpenTelemetry."""

    endpoint: str = Field(
        "", description="OTLP/HTTP URL of a collector, e.g. http://collector:4318/v1/traces; empty: no traces."
    )
    share: float = Field(
        0.01, ge=0, le=1, description="Share of requests that are traced, of those whose client has not decided it."
    )

    _url = field_validator("endpoint")(http_url)
