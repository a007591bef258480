"""The table of recipes in docs/recipes/all.md, generated from the YAML files except for the last column.

python -m tests.support.recipe_table     # prints missing or outdated rows, to be pasted
"""

from __future__ import annotations

import re
from pathlib import Path

from updater.recipes import Recipe, load_recipe, recipe_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "all.md"


def made_of(recipe: Recipe) -> str:
    terms = [f"`{t.name}` × {t.weight:g}" for t in (*recipe.objectives, *recipe.regularizers) if t.weight > 0]
    parts = [f"`{recipe.adapter.kind}`", " + ".join(terms)]
    if recipe.gradients.harmonize or recipe.gradients.drop:
        parts.append("harmonized gradients")
    merge = recipe.merge
    weight = "searched" if merge.search else f"{merge.weight:g}"
    options = "".join(f", {name} {value}" for name, value in merge.options.items())
    merged = f"`{merge.rule}` {weight}{options}, from `{merge.start}`"
    parts.append("no merge" if merge.rule == "none" else merged)
    if recipe.optimizer.kind != "adamw":
        parts.append(f"`{recipe.optimizer.kind}`")
    parts.append(f"`{recipe.schedule.kind}`")
    return "; ".join(parts)


def row(name: str) -> str:
    recipe = load_recipe(name)
    return f"| `{name}` | {recipe.description.rstrip('.')} | {made_of(recipe)} |"


def told() -> dict[str, str]:
    return {found[1]: found[0] for found in re.finditer(r"^\| `([a-z0-9._-]+)` \|.*$", PAGE.read_text(), re.M)}


def missing() -> list[str]:
    """Rows that are missing or outdated on the page, as they should be; the last cell is written by hand."""
    there = told()
    return [row(name) for name in recipe_names() if not there.get(name, "").startswith(row(name))]


if __name__ == "__main__":
    print("\n".join(missing()))
