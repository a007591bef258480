"""The tour of a first visit: what is where. The same steps are the help page ``/tour``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """One stop."""

    target: str
    """Id of the element on the Overview that it points to."""
    title: str
    text: str
    link: str
    """The page that tells more."""


STEPS: Final = (
    Step(
        "tour-health",
        "Is it healthy?",
        "Whether every part answers, how many requests are being answered, and what is being prepared.",
        "/models",
    ),
    Step(
        "tour-live",
        "What is live?",
        "The release that answers: one CLIP adapter and one VLM adapter, each on a base that never changes.",
        "/releases",
    ),
    Step(
        "tour-learning",
        "Is it learning?",
        "How many fresh items the next verdict has, and how many it needs. An update is trained when there are enough.",
        "/gate",
    ),
    Step(
        "tour-cost",
        "What does it cost?",
        "Learning may compute so much a day. The bar shows what is left.",
        "/budget",
    ),
    Step(
        "tour-stream",
        "Does data come in?",
        "What ingest reads and waits for, and offsets that were lost. Refused records are under Quarantine.",
        "/stream",
    ),
    Step(
        "nav-gate",
        "Why did an update pass, or not?",
        "The gate asks the candidate and the live model the same questions. Each verdict has its report.",
        "/gate",
    ),
    Step(
        "nav-releases",
        "How do I take one back?",
        "Under Releases: roll back, release, hold. Each action says first what it will do, and wants a reason. "
        "It needs a key that may operate.",
        "/releases",
    ),
)
