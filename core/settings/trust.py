"""Settings of trust in the sources of samples."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pydantic import Field

from core.settings.section import Section


class SourceRule(Section):
    """Bounds on the samples of a source."""

    share: float = Field(
        1.0, gt=0, le=1, description="Maximum share of an update's new samples, of all sources that match together."
    )
    per_day: int = Field(
        0, ge=0, description="Samples of each source within a day (UTC) after which further ones are held; 0: no limit."
    )
    hold: bool = Field(False, description="Hold all samples until an operator has accepted them.")


class Trust(Section):
    """How far the sources of samples are believed."""

    sources: dict[str, SourceRule] = Field(
        default_factory=lambda: {"feedback:*": SourceRule(share=0.1, per_day=100)},
        description="Rules by source, or by pattern such as `feedback:*`; the first that matches counts.",
    )
    hold_below: float = Field(
        1.5,
        ge=0,
        description="Hold samples whose image and text agree less than the lower quartile of their source and domain "
        "by more than this many interquartile ranges; 0: none.",
    )
    retry_without: bool = Field(
        True, description="Train a rejected update once more without the source that the gate blames."
    )

    def rule(self, source: str) -> tuple[str, SourceRule] | None:
        """The first pattern that matches a source, and its rule."""
        return next((each for each in self.sources.items() if fnmatchcase(source, each[0])), None)
