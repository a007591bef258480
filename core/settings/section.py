"""Base of all groups of settings."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

MIB = 1024 * 1024


class Section(BaseModel):
    """A group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


def http_url(value: str) -> str:
    """Check that a setting is empty, or an http(s) URL without user and password, which would be shown."""
    if value:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give an http:// or https:// URL")
        if parts.username or parts.password:
            raise ValueError("user and password have settings of their own")
    return value
