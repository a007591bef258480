"""Conditions in Lance's SQL."""

from __future__ import annotations

from datetime import datetime


def quoted(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("'", "''") + "'"


def moment(time: datetime) -> str:
    """A literal of a time, which must have a zone."""
    return f"timestamp '{time.astimezone().isoformat()}'"


def hexadecimal(data: bytes) -> str:
    """A binary literal."""
    return f"X'{data.hex()}'"
