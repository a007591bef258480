"""Recipes: how an update is trained, as YAML files found by name.

>>> load_recipe("default").mixture.new
0.34
"""

from ops.ledger.rows import Family
from updater.recipes.recipe import (
    Adapter,
    Gradients,
    Merge,
    Mixture,
    Optimizer,
    Part,
    Recipe,
    Schedule,
    Term,
    Tower,
    TrainPrecision,
    load_recipe,
    recipe_names,
)

__all__ = [
    "Adapter",
    "Family",
    "Gradients",
    "Merge",
    "Mixture",
    "Optimizer",
    "Part",
    "Recipe",
    "Schedule",
    "Term",
    "Tower",
    "TrainPrecision",
    "load_recipe",
    "recipe_names",
]
