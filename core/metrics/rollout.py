"""Verbs of canaries, shadows and the guard."""

from __future__ import annotations

from core.metrics import declared as d


class rollout:
    """Verbs of canaries, shadows and the guard."""

    @staticmethod
    def watching(release: int, share: float) -> None:
        """The guard looks at this release (0: at none), which answers this share of the requests."""
        d.GUARD_RELEASE.set(release)
        d.RELEASE_SHARE.set(share)

    @staticmethod
    def answered(side: str) -> None:
        """A request went to the ``trial`` or to the ``stable`` side."""
        d.ROLLOUT_REQUESTS.labels(side).inc()

    @staticmethod
    def compared(family: str, outcome: str) -> None:
        """Both sides had an input: ``agree``, ``differ``, ``failed``, or it was ``dropped``."""
        d.ROLLOUT_COMPARISONS.labels(family, outcome).inc()

    @staticmethod
    def agreement(family: str, share: float) -> None:
        """Share of inputs on which both sides agree so far."""
        d.ROLLOUT_AGREEMENT.labels(family).set(share)

    @staticmethod
    def decided(decision: str, guardrail: str) -> None:
        """The guard ``rolled_back`` a release, and for which guardrail, or ``promoted`` it."""
        d.GUARD_DECISIONS.labels(decision, guardrail).inc()
