"""The loss of an update: terms that add up, one file each, found by their module's name.

A new term is one file here that defines ``TERM``, a subclass of :class:`updater.objectives.base.Objective`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

import torch

from ops.errors import ConfigError
from updater.objectives.base import Batch, Objective
from updater.recipes import Term

__all__ = ["Batch", "Objective", "build", "names", "total"]


def names() -> list[str]:
    """Names of the objectives that a recipe may use."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")


def build(terms: Sequence[Term]) -> list[tuple[Term, Objective]]:
    """The objectives of a recipe. Raises ConfigError for a name or an option that does not exist."""
    built = []
    for term in terms:
        if term.name not in names():
            raise ConfigError(f"there is no objective {term.name!r}.", f"Use one of {', '.join(names())}.")
        kind: type[Objective] = importlib.import_module(f"{__name__}.{term.name}").TERM
        try:
            built.append((term, kind(**term.options)))
        except TypeError as error:
            raise ConfigError(f"objective {term.name!r}: {error}.", "See its file for its options.") from None
    return built


def total(objectives: Sequence[tuple[Term, Objective]], batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum over all terms (scalar), and each term alone, unweighted and detached."""
    loss = batch.image.new_zeros(())
    alone: dict[str, torch.Tensor] = {}
    for term, objective in objectives:
        rows = batch.rows(term.over)
        if term.weight == 0 or len(rows) == 0:
            continue
        value = objective(batch.select(rows))
        loss = loss + term.weight * value
        alone[term.name] = value.detach()
    return loss, alone
