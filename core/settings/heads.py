"""Settings of the heads that updates learn."""

from __future__ import annotations

from pydantic import Field

from core.settings.section import Section

HEAD_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
MAX_HEADS = 64
"""Of one adapter."""


class LearnedHead(Section):
    """A classifier over labelled samples, learned with every update of the CLIP and released with it."""

    name: str = Field(pattern=HEAD_NAME, description="What `/v1/classify` calls it.")
    domains: list[str] = Field(
        default_factory=list, description="Domains whose samples it learns from, those with a label; empty: all."
    )
    min_images: int = Field(8, ge=2, description="A label with fewer samples is no class yet.")
    max_images: int = Field(
        5000, ge=4, le=1_000_000, description="Most samples that it learns from, as many of each class."
    )
