"""The loss of an update: terms that add up, one file each, found by their module's name.

A new term is one file here that defines ``TERM``, a subclass of :class:`updater.objectives.objective.Objective`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from ops.errors import ConfigError
from updater.objectives.objective import Answers, Batch, Features, Objective, Sides, Teacher, Texts
from updater.recipes import Family, Term
from updater.recipes.plugin_registry import file_names, options_of

__all__ = ["Answers", "Batch", "Features", "Objective", "Sides", "Teacher", "Texts", "build", "names", "values"]

Terms = Sequence[tuple[Term, Objective[Any]]]
"""A recipe's terms with what computes them."""


def names(family: Family) -> list[str]:
    """Names of the objectives that a recipe of a family may use."""
    return [name for name in file_names(__name__) if _kind(name).family == family]


def build(terms: Sequence[Term], family: Family) -> list[tuple[Term, Objective[Any]]]:
    """The objectives of a recipe. Raises ConfigError for a name or an option that its family does not have."""
    built = []
    known = names(family)
    for term in terms:
        if term.name not in known:
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
    return importlib.import_module(f"{__name__}.{name}").TERM  # type: ignore[no-any-return]
