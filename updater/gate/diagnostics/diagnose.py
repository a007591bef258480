"""All diagnostics of one gate run, from answers and features that it already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.errors import RatchetError
from updater.gate.decision import Scores
from updater.gate.diagnostics.concept_counts import ConceptCounts
from updater.gate.diagnostics.results import YES_BOUND, Diagnostics
from updater.gate.diagnostics.tail import measure_tail
from updater.gate.evaluator import Evaluator, M


def diagnose(
    evaluator: Evaluator[M],
    scores: Sequence[Scores],
    incumbent: str | None,
    candidate: str,
    counts: ConceptCounts | None,
) -> Diagnostics:
    """What is told beside a decision. It decides nothing, so what cannot be computed becomes a warning.

    Args:
        scores: all suites; none where the candidate could not be scored.
        counts: of concepts in the training data; None: there are none, and results are not split by them.
    """
    if not scores:
        return Diagnostics()
    warnings = []
    diagnostics = Diagnostics()
    try:
        diagnostics = evaluator.diagnostics(scores, incumbent, candidate)
    except (RatchetError, RuntimeError, ValueError) as error:
        warnings.append(f"features and answers could not be compared: {error}")
    try:
        diagnostics = replace(diagnostics, tail=measure_tail(scores, counts) if counts else None)
    except RatchetError as error:
        warnings.append(f"results are not split by how often concepts were seen: {error.message}")
    return replace(diagnostics, warnings=(*_moved_away(diagnostics), *warnings))


def _moved_away(diagnostics: Diagnostics) -> list[str]:
    """Suites whose share of "yes" left the truth."""
    return [
        f'{name}: "yes" is {share.after:.0%} of the answers, before {share.before:.0%}; it is right for '
        f"{share.truth:.0%} (a warning from {YES_BOUND:.0%} further away)"
        for name, share in diagnostics.yes.items()
        if share.moved_away > YES_BOUND
    ]
