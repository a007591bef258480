"""What the gate needs of a family of models: load adapters, answer suites, be checked. Everything else is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from updater.gate.decision import ItemScores, Scores
from updater.gate.diagnostics.results import Diagnostics
from updater.gate.suite_items import Item, spread
from updater.gate.suites import Family, Suite
from updater.gate.verdict import Check, CrossVersion, Regression

M = TypeVar("M", bound=ItemScores)

PROBE = 64
"""Items that the engineering checks look at."""


class Evaluator(Protocol[M]):
    """One serving engine of a base and its resident adapters: what is gated is what is served."""

    @property
    def family(self) -> Family:
        """Whose suites it answers."""

    @property
    def base(self) -> ClipBase | VlmBase:
        """The base of all its models."""

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Make an adapter resident. Raises AdapterError; GateError when the engine is dead.

        A `candidate` that the trainer made is compared with the trainer's model.
        """

    def checks(self, candidate: str, suites: Sequence[Suite], facts: Mapping[str, Any]) -> list[Check]:
        """Engineering checks before anything is scored; those named `loads` and `finite` decide whether it is."""

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> M:
        """One model's answers to one suite; None is the base. Raises GateError for what no model could answer."""

    def answer_checks(self, candidate: str, suites: Sequence[Suite]) -> list[Check]:
        """Engineering checks that look at the answers to all suites, after they were scored."""

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        """How the candidate's texts find images that the incumbent embedded. None where that is no question."""

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        """What is told beside the decision and is of this family; after all suites were scored."""

    def chance(self, suite: Suite) -> float:
        """What guessing scores."""

    def regressions(self, suite: Suite, before: M, after: M) -> tuple[Regression, ...]:
        """Items that were right before and are wrong now."""


def probe(suites: Sequence[Suite]) -> list[tuple[Suite, list[Item]]]:
    """A few items of every suite, about PROBE in all."""
    share = max(2, PROBE // max(len(suites), 1))
    return [(suite, spread(suite.items(), share)) for suite in suites]
