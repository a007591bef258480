"""Where ingest stands, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from core.dependencies import Dependency

State = Literal["starting", "joining", "reading", "waiting", "stopped"]


@dataclass(frozen=True, slots=True)
class IngestStatus:
    """Where ingest stands."""

    state: State = "starting"
    """``joining`` is of the consumer group; ``waiting`` is for :attr:`waiting_for`."""
    waiting_for: Dependency | Literal[""] = ""
    samples: int = 0
    duplicates: int = 0
    corrected: int = 0
    """Samples that were replaced by corrections of them."""
    quarantined: int = 0
    tombstones: int = 0
    gap_offsets: int = 0
    """Offsets that were lost before they were read."""
    rewritten_offsets: int = 0
    """Offsets that were cut off the log after their records were stored; other records stand there now."""
    commits: int = 0
    version: int = 0
    lag: int | None = None
    """Records between the store and the end of the log; None until it is known."""
    offsets: dict[str, int] = field(default_factory=dict)
    problem: str = ""
