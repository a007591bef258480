"""The loss of an update: terms that add up, one file each, found by their module's name.

A new term is one file here that defines ``TERM``, a subclass of
:class:`updater.methods.objectives.objective.Objective`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from core.errors import ConfigError
from updater.methods.objectives.objective import Answers, Batch, Features, Objective, OwnAnswers, Sides, Teacher, Texts
from updater.recipes import Family, Term
from updater.recipes.plugin_registry import find, method_names, options_of

__all__ = [
    "Answers",
    "Batch",
    "Features",
    "Objective",
    "OwnAnswers",
    "Sides",
    "Teacher",
    "Texts",
    "build",
    "names",
    "values",
]

log = logging.getLogger("ratchet.recipes")
Terms = Sequence[tuple[Term, Objective[Any]]]
"""A recipe's terms with what computes them."""


def names(family: Family) -> list[str]:
    """Names of the objectives that a recipe of a family may use."""
    return [name for name in method_names(__name__) if _family(name) == family]


def build(terms: Sequence[Term], family: Family) -> list[tuple[Term, Objective[Any]]]:
    """The objectives of a recipe. Raises ConfigError for a name or an option that its family does not have."""
    built = []
    known = names(family)
    for term in terms:
        if term.name not in known:
            if term.name in method_names(__name__):
                _kind(term.name)  # says why, if it cannot be imported
            raise ConfigError(
                f"there is no objective {term.name!r} for a {family.upper()}.", f"Use one of {', '.join(known)}."
            )
        kind = _kind(term.name)
        with options_of("objective", term.name):
            built.append((term, kind(**term.options)))
    return built


def values(objectives: Terms, batch: Batch) -> list[tuple[Term, torch.Tensor]]:
    """Each term that has a weight and rows to see, with its value, unweighted."""
    weighted = []
    for term, objective in objectives:
        rows = batch.rows(term.over)
        if term.weight > 0 and rows:
            weighted.append((term, objective(batch.select(rows))))
    return weighted


def _kind(name: str) -> type[Objective[Any]]:
    return find(__name__, "TERM", "objective", name, [name])  # type: ignore[no-any-return]


def _family(name: str) -> Family | None:
    """None for one of another package that cannot be imported: only recipes that name it end with its error."""
    try:
        return _kind(name).family
    except ConfigError as error:
        log.warning("%s", error)
        return None
