"""Recipes: how an update is trained, as YAML files found by name.

>>> load_recipe("default").mixture.new
0.34
"""

from ops.ledger.rows import Family
from updater.recipes.recipe import (
    Merge,
    Mixture,
    Part,
    Recipe,
    Schedule,
    Term,
    Tower,
    load_recipe,
    recipe_names,
)

__all__ = [
    "Family",
    "Merge",
    "Mixture",
    "Part",
    "Recipe",
    "Schedule",
    "Term",
    "Tower",
    "load_recipe",
    "recipe_names",
]
