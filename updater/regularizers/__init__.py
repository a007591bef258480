"""Terms of the loss over parameters instead of examples, one file each, found by their module's name.

A new one is one file here that defines ``REGULARIZER``, a subclass of :class:`updater.regularizers.base.Regularizer`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from ops.errors import ConfigError
from updater.recipes import Recipe, Term
from updater.regularizers.base import Parameters, Regularizer

__all__ = ["Parameters", "Regularizer", "build", "names"]


def names() -> list[str]:
    """Names of the regularizers that a recipe may use."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def build(recipe: Recipe) -> Sequence[tuple[Term, Regularizer]]:
    """The regularizers of a recipe. Raises ConfigError for an unknown name or option, or where one has no meaning."""
    built = []
    for term in recipe.regularizers:
        if term.name not in names():
            raise ConfigError(f"there is no regularizer {term.name!r}.", f"Use one of {', '.join(names())}.")
        kind: type[Regularizer] = importlib.import_module(f"{__name__}.{term.name}").REGULARIZER
        if kind.fixed_coordinates and recipe.adapter.kind not in ("full", "layer_norm", "bias"):
            raise ConfigError(
                f"regularizer {term.name!r} compares weights between updates, and the factors of "
                f"{recipe.adapter.kind!r} are not the same ones in the next update.",
                "Use it with adapter.kind full, layer_norm or bias.",
            )
        try:
            built.append((term, kind(**term.options)))
        except TypeError as error:
            raise ConfigError(f"regularizer {term.name!r}: {error}.", "See its file for its options.") from None
    return built
