"""How the trained delta joins the one in service, one rule per file, found by its module's name.

A new rule is one file here that defines ``RULE``: a function ``(served, trained, start, weight, **options) -> delta``
over :class:`updater.adapters.Delta`, all differences to the base; ranks may add up, the writer compresses them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from ops.errors import ConfigError
from updater.adapters import Delta
from updater.recipes import Merge

__all__ = ["NONE", "merged", "names"]

NONE = "none"


class Rule(Protocol):
    """One way to merge."""

    def __call__(
        self, served: Delta, trained: Delta, start: Delta, weight: float, **options: float | int | str | bool
    ) -> Delta:
        """What is served next. ``start`` is where training began: empty for the base."""


def names() -> list[str]:
    """Names that a recipe's ``merge.rule`` may have."""
    return sorted({NONE, *(module.name for module in pkgutil.iter_modules(__path__))})


def merged(merge: Merge, served: Delta, trained: Delta, start: Delta) -> Delta:
    """What is served after an update. Raises ConfigError for an unknown rule or option."""
    if merge.rule == NONE:
        return trained
    if merge.rule not in names():
        raise ConfigError(f"there is no merge rule {merge.rule!r}.", f"Use one of {', '.join(names())}.")
    rule: Rule = importlib.import_module(f"{__name__}.{merge.rule}").RULE
    try:
        return rule(served, trained, start, merge.weight, **merge.options)
    except TypeError as error:
        raise ConfigError(f"merge rule {merge.rule!r}: {error}.", "See its file for its options.") from None
