"""Which layers of a vision-language model learn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from serving.engines.vlm.vlm_base import VlmBase
from updater.families.modules import BLOCK_LISTS, late_layers, some
from updater.recipes import Recipe, Tower

EYES = ("image", "connector")
"""Parts that work on images alone: what they give is the same for every question."""
_BLOCK = re.compile(rf"(.*?\.(?:{'|'.join(BLOCK_LISTS)}))\.(\d+)\.")


def trained_modules(base: VlmBase, model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers that learn under a recipe. Raises ConfigError when that is none."""
    wanted: dict[str, Tower] = {"image": recipe.image, "connector": recipe.connector, "text": recipe.text}
    chosen: list[str] = []
    for part, tower in wanted.items():
        names = [name for name, _ in model.named_modules() if base.part_of(name) == part]
        chosen += late_layers(names, part, tower, *find_blocks(names), recipe)
    return some(chosen, recipe, base.name)


def find_blocks(names: Iterable[str]) -> tuple[str, int]:
    """Name of the list of blocks that most of these layers are in, and how many there are; ("", 0) without one."""
    numbered = [(match[1], int(match[2])) for match in map(_BLOCK.match, names) if match]
    if not numbered:
        return "", 0
    blocks = Counter(name for name, _ in numbered).most_common(1)[0][0]
    return blocks, 1 + max(number for name, number in numbered if name == blocks)


def sees(base: VlmBase, names: Iterable[str]) -> bool:
    """Whether any of these layers works on images."""
    return any(base.part_of(name) in EYES for name in names)
