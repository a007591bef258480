"""The layers of a model that learn: the last blocks of its parts, as a recipe says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from core.errors import ConfigError
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.vlm.vlm_base import VlmBase
from updater.recipes import Recipe, Tower

BLOCK_LISTS = ("blocks", "resblocks", "layer", "layers", "stages")
"""Names of the list of a tower's blocks in timm, open_clip and transformers."""
EYES = ("image", "connector")
"""Parts that work on images alone: what they give is the same for every question."""
_BLOCK = re.compile(rf"(.*?\.(?:{'|'.join(BLOCK_LISTS)}))\.(\d+)\.")
Which = Literal["image", "text"]


def tower_blocks(model: nn.Module, which: Which) -> tuple[str, int]:
    """Name of the tower's list of blocks, and how many there are; ("", 0) when it has none that is known."""
    for name, module in model.named_modules():
        known = name.rsplit(".", 1)[-1] in BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential)
        if known and tower_of(name) == which and len(module) > 1:
            return name, len(module)
    return "", 0


def clip_layers(base: ClipBase, model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers that learn under a recipe. Raises ConfigError when that is none."""
    chosen: list[str] = []
    wanted: dict[Which, Tower] = {"image": recipe.image, "text": recipe.text}
    for which, tower in wanted.items():
        pattern = re.compile(base.lora_targets[which])
        names = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
        chosen += late_layers(names, which, tower, *tower_blocks(model, which), recipe)
    return chosen_names(chosen, recipe, base.name)


def first_touched(names: Iterable[str], model: nn.Module, which: Which) -> int:
    """The first block that any of ``names`` is in: blocks below it form the prefix.

    Layers of the tower outside the blocks come after them, but for stems, which make it 0.
    """
    blocks, count = tower_blocks(model, which)
    own = [name for name in names if tower_of(name) == which]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    start = order.get(blocks, 0)
    numbers = [_block_number(name, blocks) for name in own]
    stems = [name for name, number in zip(own, numbers, strict=True) if number is None and order[name] < start]
    return 0 if stems or not blocks else min((n for n in numbers if n is not None), default=count)


def vlm_layers(base: VlmBase, model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers that learn under a recipe. Raises ConfigError when that is none."""
    wanted: dict[str, Tower] = {"image": recipe.image, "connector": recipe.connector, "text": recipe.text}
    chosen: list[str] = []
    for part, tower in wanted.items():
        names = [name for name, _ in model.named_modules() if base.part_of(name) == part]
        chosen += late_layers(names, part, tower, *_vlm_blocks(names), recipe)
    return chosen_names(chosen, recipe, base.name)


def _vlm_blocks(names: Iterable[str]) -> tuple[str, int]:
    """Name of the list of blocks that most of these layers are in, and how many there are; ("", 0) without one."""
    numbered = [(match[1], int(match[2])) for match in map(_BLOCK.match, names) if match]
    if not numbered:
        return "", 0
    blocks = Counter(name for name, _ in numbered).most_common(1)[0][0]
    return blocks, 1 + max(number for name, number in numbered if name == blocks)


def sees(base: VlmBase, names: Iterable[str]) -> bool:
    """True if any of these layers works on images."""
    return any(base.part_of(name) in EYES for name in names)


def _block_number(name: str, blocks: str) -> int | None:
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
    numbers = {name: _block_number(name, blocks) for name in names}
    return [name for name, number in numbers.items() if number is None or number >= first]


def chosen_names(chosen: Sequence[str], recipe: Recipe, base: str) -> list[str]:
    """The layers that learn, in order. Raises ConfigError when there are none."""
    if not chosen:
        raise ConfigError(f"recipe {recipe.name}: no layer of base {base!r} would learn.", "Raise `blocks`.")
    return sorted(set(chosen))
