"""How the trained delta joins the one in service, one rule per file, found by its module's name.

A new rule is one file here that defines ``RULE``: a function ``(served, trained, start, weight, **options) -> delta``
over :class:`updater.adapters.WeightDelta`, all differences to the base; ranks may add up, the writer compresses them.
One that looks at the updates before is a class, a :class:`RememberingRule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from updater.adapters import WeightDelta
from updater.recipes import Merge
from updater.recipes.plugin_registry import find, method_names, options_of

__all__ = ["NONE", "Memory", "RememberingRule", "merged", "names", "remembered"]

NONE = "none"
Memory = Mapping[str, Tensor]
"""What a rule keeps of the updates so far, in their carry-over; empty before the first one."""


class RememberingRule(ABC):
    """A rule that looks at all updates so far. Keyword arguments of ``__init__`` are the recipe's ``merge.options``."""

    @abstractmethod
    def remember(
        self, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
    ) -> dict[str, Tensor]:
        """The memory with this update, from the one without it."""

    @abstractmethod
    def __call__(self, served: WeightDelta, trained: WeightDelta, weight: float, memory: Memory) -> WeightDelta:
        """What is served next. ``memory``: with this update."""


def names() -> list[str]:
    """Names that a recipe's ``merge.rule`` may have."""
    return sorted([NONE, *method_names(__name__)])


def merged(
    merge: Merge, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory | None = None
) -> WeightDelta:
    """What is served after an update. Raises ConfigError for an unknown rule or option.

    Args:
        memory: what :func:`remembered` gave for this update; None: there was none before it.
    """
    if merge.rule == NONE:
        return trained
    rule = _rule(merge)
    with options_of("merge rule", merge.rule):
        if isinstance(rule, RememberingRule):
            memory = rule.remember(served, trained, start, {}) if memory is None else memory
            return rule(served, trained, merge.weight, memory)
        return rule(served, trained, start, merge.weight, **merge.options)  # type: ignore[no-any-return]


def remembered(
    merge: Merge, served: WeightDelta, trained: WeightDelta, start: WeightDelta, memory: Memory
) -> dict[str, Tensor]:
    """What the rule remembers of this update and those before; nothing for most rules."""
    rule = None if merge.rule == NONE else _rule(merge)
    return rule.remember(served, trained, start, memory) if isinstance(rule, RememberingRule) else {}


def _rule(merge: Merge) -> Any:
    """A function, or a remembering rule with the recipe's options."""
    rule = find(__name__, "RULE", "merge rule", merge.rule, names())
    if not isinstance(rule, type):
        return rule
    with options_of("merge rule", merge.rule):
        return rule(**merge.options)
