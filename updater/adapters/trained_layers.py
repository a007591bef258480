"""The layers of a model that learn: the last blocks of its parts, as the recipe says."""

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
"""Names of a tower's list of blocks in timm, open_clip and transformers."""
EYES = ("image", "connector")
"""Parts that see images only: their output is the same for every question."""
_BLOCK = re.compile(rf"(.*?\.(?:{'|'.join(BLOCK_LISTS)}))\.(\d+)\.")
Which = Literal["image", "text"]
LAYERS = {"all": re.compile(""), "attention": re.compile(r"(?:^|[._])attn\b|attention\b")}
"""Values of LoRA's option ``layers``, and what is in the names of such layers in timm, open_clip and transformers."""


def tower_blocks(model: nn.Module, which: Which) -> tuple[str, int]:
    """Name of the tower's list of blocks and its length; ("", 0) without a known one."""
    for name, module in model.named_modules():
        known = name.rsplit(".", 1)[-1] in BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential)
        if known and tower_of(name) == which and len(module) > 1:
            return name, len(module)
    return "", 0


def clip_layers(base: ClipBase, model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers that learn. Raises ConfigError if there are none."""
    chosen: list[str] = []
    wanted: dict[Which, Tower] = {"image": recipe.image, "text": recipe.text}
    for which, tower in wanted.items():
        pattern = re.compile(base.lora_targets[which])
        names = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
        chosen += late_layers(names, which, tower, *tower_blocks(model, which), recipe)
    return chosen_names(chosen, recipe, base.name)


def first_touched(names: Iterable[str], model: nn.Module, which: Which) -> int:
    """First block that contains any of ``names``; the blocks below it form the prefix. Layers of the tower outside the
    blocks come after them, except stems, which give 0."""
    blocks, count = tower_blocks(model, which)
    own = [name for name in names if tower_of(name) == which]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    start = order.get(blocks, 0)
    numbers = [_block_number(name, blocks) for name in own]
    stems = [name for name, number in zip(own, numbers, strict=True) if number is None and order[name] < start]
    return 0 if stems or not blocks else min((n for n in numbers if n is not None), default=count)


def vlm_layers(base: VlmBase, model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers that learn. Raises ConfigError if there are none."""
    wanted: dict[str, Tower] = {"image": recipe.image, "connector": recipe.connector, "text": recipe.text}
    chosen: list[str] = []
    for part, tower in wanted.items():
        names = [name for name, _ in model.named_modules() if base.part_of(name) == part]
        chosen += late_layers(names, part, tower, *_vlm_blocks(names), recipe)
    return chosen_names(chosen, recipe, base.name)


def _vlm_blocks(names: Iterable[str]) -> tuple[str, int]:
    """Name of the list of blocks that holds most of these layers, and its length; ("", 0) without one."""
    numbered = [(match[1], int(match[2])) for match in map(_BLOCK.match, names) if match]
    if not numbered:
        return "", 0
    blocks = Counter(name for name, _ in numbered).most_common(1)[0][0]
    return blocks, 1 + max(number for name, number in numbered if name == blocks)


def sees(base: VlmBase, names: Iterable[str]) -> bool:
    return any(base.part_of(name) in EYES for name in names)


def _block_number(name: str, blocks: str) -> int | None:
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) if blocks else None
    return int(match[1]) if match else None


def late_layers(names: Sequence[str], part: str, tower: Tower, blocks: str, count: int, recipe: Recipe) -> list[str]:
    """Layers of one part that learn: those in its last blocks, or outside the blocks. ``blocks``: name of the part's
    list of blocks; empty without a known one. ``count``: number of blocks in it. Raises ConfigError: the recipe counts
    blocks, and the part has no list of them."""
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


def low_rank_layers(chosen: Sequence[str], recipe: Recipe, base: str) -> list[str]:
    """Those of the chosen layers that LoRA's option ``layers`` allows. Raises ConfigError: it is not known, or allows
    none of them."""
    options = dict(recipe.adapter.options)
    kind = options.pop("layers", "all")
    if options or kind not in LAYERS:
        name, allowed = (next(iter(options)), "layers") if options else (kind, " or ".join(LAYERS))
        raise ConfigError(f"recipe {recipe.name}: adapter.options: {name!r} is not known.", f"Use {allowed}.")
    return chosen_names([name for name in chosen if LAYERS[str(kind)].search(name)], recipe, base)


def chosen_names(chosen: Sequence[str], recipe: Recipe, base: str) -> list[str]:
    """Raises ConfigError if no layer would learn."""
    if not chosen:
        raise ConfigError(
            f"recipe {recipe.name}: no layer of base {base!r} would learn.",
            "Raise `blocks`, or leave out LoRA's option `layers`.",
        )
    return sorted(set(chosen))
