"""Which layers of a model learn: the last blocks of its parts, as a recipe says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from core.errors import ConfigError
from updater.recipes import Recipe, Tower

BLOCK_LISTS = ("blocks", "resblocks", "layer", "layers", "stages")
"""What timm, open_clip and transformers call the list of a tower's blocks."""


def block_number(name: str, blocks: str) -> int | None:
    """The number of the block that a module is in, or None when it is in none."""
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) if blocks else None
    return int(match[1]) if match else None


def late_layers(names: Sequence[str], part: str, tower: Tower, blocks: str, count: int, recipe: Recipe) -> list[str]:
    """Of the layers of one part those that learn: in its last blocks, or outside them.

    Args:
        blocks: name of the part's list of blocks; empty when it has none that is known.
        count: blocks in it.

    Raises:
        ConfigError: the recipe counts blocks where there are none.
    """
    if tower.locked:
        return []
    if tower.blocks is None:
        return list(names)
    if not blocks:
        raise ConfigError(
            f"recipe {recipe.name}: the {part} part of this base has no list of blocks that is known.",
            f"Leave {part}.blocks out, so that all of it learns.",
        )
    first = max(0, count - tower.blocks)
    numbers = {name: block_number(name, blocks) for name in names}
    return [name for name, number in numbers.items() if number is None or number >= first]


def some(chosen: Sequence[str], recipe: Recipe, base: str) -> list[str]:
    """The layers that learn, in order. Raises ConfigError when there are none."""
    if not chosen:
        raise ConfigError(f"recipe {recipe.name}: no layer of base {base!r} would learn.", "Raise `blocks`.")
    return sorted(set(chosen))
