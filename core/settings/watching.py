"""Settings of observability: drift, logs, traces."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from core.settings.section import Section, http_url


class Watch(Section):
    """Measurements of the catalog and of the incoming data."""

    seconds: float = Field(30.0, gt=0, description="Interval between measurements, if something has changed.")
    drift_window: int = Field(
        128, ge=8, le=100_000, description="Newest samples to compare with four times as many before them, for drift."
    )


class Logs(Section):
    """Logs of the processes, on standard error."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="JSON lines or text; auto: text at a terminal, else JSON."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of Ratchet's own records; libraries log warnings and errors."
    )


class Traces(Section):
    """Spans of requests to the model server, for OpenTelemetry."""

    endpoint: str = Field(
        "", description="OTLP/HTTP URL of a collector, e.g. http://collector:4318/v1/traces; empty: off."
    )
    share: float = Field(0.01, ge=0, le=1, description="Share of requests to trace, unless the client decides.")

    _url = field_validator("endpoint")(http_url)
