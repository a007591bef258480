"""How the trained delta joins the one in service, one rule per file, found by its module's name.

A new rule is one file here that defines ``RULE``: a function ``(served, trained, start, weight, **options) -> delta``
over :class:`updater.adapters.WeightDelta`, all differences to the base; ranks may add up, the writer compresses them.
"""

from __future__ import annotations

from typing import Protocol

from updater.adapters import WeightDelta
from updater.recipes import Merge
from updater.recipes.plugin_registry import find, method_names, options_of

__all__ = ["NONE", "merged", "names"]

NONE = "none"


class Rule(Protocol):
    """One way to merge."""

    def __call__(
        self,
        served: WeightDelta,
        trained: WeightDelta,
        start: WeightDelta,
        weight: float,
        **options: float | int | str | bool,
    ) -> WeightDelta:
        """What is served next. ``start`` is where training began: empty for the base."""


def names() -> list[str]:
    """Names that a recipe's ``merge.rule`` may have."""
    return sorted([NONE, *method_names(__name__)])


def merged(merge: Merge, served: WeightDelta, trained: WeightDelta, start: WeightDelta) -> WeightDelta:
    """What is served after an update. Raises ConfigError for an unknown rule or option."""
    if merge.rule == NONE:
        return trained
    rule: Rule = find(__name__, "RULE", "merge rule", merge.rule, names())
    with options_of("merge rule", merge.rule):
        return rule(served, trained, start, merge.weight, **merge.options)
