"""Terms of the loss over parameters instead of examples, one file each, found by their module's name.

A new one is one file here that defines ``REGULARIZER``, a subclass of
:class:`updater.methods.regularizers.regularizer.Regularizer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import ConfigError
from updater.methods.regularizers.regularizer import Parameters, Regularizer
from updater.recipes import Recipe, Term
from updater.recipes.plugin_registry import find, method_names, options_of

__all__ = ["Parameters", "Regularizer", "build", "names"]


def names() -> list[str]:
    """Names of the regularizers that a recipe may use."""
    return method_names(__name__)


def build(recipe: Recipe) -> Sequence[tuple[Term, Regularizer]]:
    """The regularizers of a recipe. Raises ConfigError for an unknown name or option, or where one has no meaning."""
    built = []
    for term in recipe.regularizers:
        kind: type[Regularizer] = find(__name__, "REGULARIZER", "regularizer", term.name, names())
        if kind.fixed_coordinates and recipe.adapter.kind not in ("full", "layer_norm", "bias"):
            raise ConfigError(
                f"regularizer {term.name!r} compares weights between updates, and the factors of "
                f"{recipe.adapter.kind!r} are not the same ones in the next update.",
                "Use it with adapter.kind full, layer_norm or bias.",
            )
        with options_of("regularizer", term.name):
            built.append((term, kind(**term.options)))
    return built
