"""Recipes: how an update is trained, as YAML files found by name.

>>> load_recipe("default").mixture.new
0.34
"""

from core.ledger.rows import Family
from updater.recipes.recipe import (
    PLACE,
    Adapter,
    Batches,
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
    Views,
    load_recipe,
    recipe_names,
)

__all__ = [
    "PLACE",
    "Adapter",
    "Batches",
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
    "Views",
    "load_recipe",
    "recipe_names",
]
