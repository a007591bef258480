"""Bounds on samples that the sample store takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sample. The defaults are those of ingest."""

    max_image_bytes: int = 8 * 1024 * 1024
    """Largest encoded image."""
    max_pixels: int = 40_000_000
    """Largest decoded image, in pixels."""
    min_side: int = 8
    """Shortest side of an image, in pixels."""
    max_text_chars: int = 2000
    """Longest text, question or answer."""


DEFAULT_LIMITS = Limits()
