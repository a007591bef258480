"""How the trained delta joins the one in service, by a rule that the recipe names.

A rule is a function ``(served, trained, start, weight, **options) -> delta`` over
:class:`updater.adapters.WeightDelta`, all differences to the base; ranks may add up, the writer compresses them. One
that looks at the updates before is a class, a :class:`RememberingRule`. The shipped recipes use :func:`linear`; other
rules are installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from updater.adapters.weight_deltas import WeightDelta, merge
from updater.recipes import Merge
from updater.recipes.plugin_registry import Methods

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


def linear(
    served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float, towards: str = "served"
) -> WeightDelta:
    """Linear interpolation: ΔW = (1 - weight) ΔW_other + weight ΔW_trained, exactly.

    ``towards``: the other end, ``served`` (EMA merge; PAINT, Ilharco et al. 2022) or ``base``, whose ΔW is 0 (WiSE-FT,
    Wortsman et al. 2022).
    """
    if towards not in ("served", "base"):
        raise TypeError(f"towards is {towards!r}, not one of served, base")
    return merge(served if towards == "served" else {}, trained, weight)


RULES: Final[Methods[Any]] = Methods("merging", "merge rule", {"linear": linear})


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
    with RULES.options_of(merge.rule):
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
    rule = RULES.find(merge.rule)
    if not isinstance(rule, type):
        return rule
    with RULES.options_of(merge.rule):
        return rule(**merge.options)
