"""How often a VLM says yes to yes/no questions: a model that drifts to one word keeps half of the points.

POPE tells the share beside accuracy (Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP
2023), and a language prior that takes over shows in it (M3ID: Favero et al., Multi-Modal Hallucination Control by
Visual Information Grounding, CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from updater.gate.answers import polarity
from updater.gate.diagnostics.results import YesShare
from updater.gate.suites import Suite

FEWEST = 20
"""Yes/no questions from which a share says anything."""


def yes_share(suite: Suite, base: Sequence[str], before: Sequence[str], after: Sequence[str]) -> YesShare | None:
    """Of the suite's questions whose reference is yes or no; None where there are few. Answers are aligned with its
    items; one that is neither yes nor no is not yes.
    """
    references = [item.answers[0] if item.answers else "" for item in suite.items()]
    closed = [bool(polarity(reference)) for reference in references]
    if sum(closed) < FEWEST:
        return None
    shares = [_share(list(compress(texts, closed))) for texts in (references, base, before, after)]
    return YesShare(sum(closed), *shares)


def _share(answers: Sequence[str]) -> float:
    return sum(polarity(answer) == "yes" for answer in answers) / len(answers)
