"""Pixel art of Cataclysm: Dark Days Ahead: sprites of a tileset, named and described by the game's data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image

from demo.data.domain import Draft, concept_of
from demo.data.packages import PackageError, read_members
from demo.data.render import Unfit, decode

_ROOT: Final = "usr/share/games/cataclysm-dda/"
LABELS: Final = {
    "MONSTER": "creature",
    "terrain": "terrain",
    "furniture": "furniture",
    "ARMOR": "clothing",
    "TOOL_ARMOR": "clothing",
    "PET_ARMOR": "clothing",
    "COMESTIBLE": "food",
    "GUN": "gun",
    "GUNMOD": "gun",
    "AMMO": "ammunition",
    "MAGAZINE": "ammunition",
    "BOOK": "book",
    "TOOL": "tool",
    "TOOLMOD": "tool",
    "GENERIC": "everyday object",
    "vehicle_part": "vehicle part",
    "WHEEL": "vehicle part",
    "ENGINE": "vehicle part",
}
"""Visible object types of the game, as eleven classes."""
MAX_TEXT: Final = 160
_MAX_PARENTS: Final = 8
_MARKUP: Final = re.compile(r"<[^>]*>")


def tileset(folder: str) -> Callable[..., Iterable[Draft]]:
    """Builder for the tileset in `folder` of the game's gfx directory."""

    def build(archive: Path) -> Iterator[Draft]:
        gfx = f"{_ROOT}gfx/{folder}/"
        config: dict[str, Any] = {}
        sheets: dict[str, bytes] = {}
        records: list[dict[str, Any]] = []

        def wanted(name: str) -> bool:
            is_data = name.startswith(f"{_ROOT}json/") and name.endswith(".json")
            return is_data or name.startswith(gfx)

        for name, content in read_members(archive, wanted):
            if name == f"{gfx}tile_config.json":
                config = json.loads(content)
            elif name.startswith(gfx):
                if name.endswith(".png"):
                    sheets[name.removeprefix(gfx)] = content
            else:
                loaded = json.loads(content)
                records.extend(r for r in (loaded if isinstance(loaded, list) else [loaded]) if _is_object(r))
        if not config or not records:
            raise PackageError(f"{archive} has no tileset {folder}.", "Delete it and run again to download it.")
        yield from _drafts(config, sheets, _things(records))

    return build


def _is_object(record: Any) -> bool:
    return isinstance(record, dict) and record.get("type") in LABELS


def _things(records: list[dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Tile ID -> name, description, label. A description may be inherited through `copy-from`."""
    parents = {str(r.get("id") or r.get("abstract")): r for r in records}

    def description(record: dict[str, Any]) -> str:
        for _ in range(_MAX_PARENTS):
            if text := _plain(record.get("description")):
                return text
            parent = parents.get(str(record.get("copy-from")))
            if parent is None or parent is record:
                break
            record = parent
        return ""

    things: dict[str, tuple[str, str, str]] = {}
    for record in records:
        name = _plain(record.get("name"))
        code = record.get("id")
        if not isinstance(code, str) or not name:
            continue
        key = f"vp_{code}" if record["type"] == "vehicle_part" else code
        things.setdefault(key, (name, description(record), LABELS[record["type"]]))
    return things


def _plain(value: Any) -> str:
    """A game text, possibly wrapped for plurals: `{"str": "apple"}`, `{"str_sp": "bread"}`."""
    if isinstance(value, dict):
        value = value.get("str") or value.get("str_sp") or ""
    return " ".join(_MARKUP.sub("", value).split()) if isinstance(value, str) else ""


def _drafts(
    config: dict[str, Any], sheets: dict[str, bytes], things: dict[str, tuple[str, str, str]]
) -> Iterator[Draft]:
    """A draft per tile with a known ID. Sprites are numbered through all sheets, in order."""
    width, height = config["tile_info"][0]["width"], config["tile_info"][0]["height"]
    tables: list[tuple[int, Image.Image, int, int]] = []
    first = 0
    for part in config["tiles-new"]:
        if part["file"] not in sheets:
            raise PackageError(f"the tileset has no sheet {part['file']}.", "Delete the archive and try again.")
        sheet = decode(sheets[part["file"]]).convert("RGBA")
        wide, high = part.get("sprite_width", width), part.get("sprite_height", height)
        tables.append((first, sheet, wide, high))
        first += (sheet.width // wide) * (sheet.height // high)
    total, used = first, set[str]()
    for part in config["tiles-new"]:
        for tile in part["tiles"]:
            codes = tile["id"] if isinstance(tile["id"], list) else [tile["id"]]
            code = next((c for c in codes if c in things and c not in used), None)
            layers = [s for s in (_sprite(tile.get("bg")), _sprite(tile.get("fg"))) if 0 <= s < total]
            if code is None or not layers:
                continue
            used.add(code)
            name, description, label = things[code]
            yield Draft(
                name=re.sub(r"[^A-Za-z0-9_-]+", "_", code),
                text=_text(name, description),
                concept=concept_of(name),
                picture=partial(_picture, tables, tuple(layers)),
                label=label,
                tags=(label,),
            )


def _sprite(value: Any) -> int:
    """The sprite number in `fg` or `bg`, which may be a list of rotations or weighted variants; -1: none."""
    while isinstance(value, list | dict):
        value = value.get("sprite") if isinstance(value, dict) else (value[0] if value else None)
    return value if isinstance(value, int) else -1


def _picture(tables: list[tuple[int, Image.Image, int, int]], layers: tuple[int, ...]) -> Image.Image:
    picture: Image.Image | None = None
    for number in layers:
        first, sheet, wide, high = next(table for table in reversed(tables) if table[0] <= number)
        row, column = divmod(number - first, sheet.width // wide)
        sprite = sheet.crop((column * wide, row * high, (column + 1) * wide, (row + 1) * high))
        if picture is None or picture.size != sprite.size:
            picture = sprite
        else:
            picture.alpha_composite(sprite)
    box = picture.getchannel("A").getbbox() if picture is not None else None
    if picture is None or box is None or max(box[2] - box[0], box[3] - box[1]) < 4:
        raise Unfit("blank")
    return picture.crop(box)


def _text(name: str, description: str) -> str:
    """`"apple. An iconic and delicious fruit ..."`: the name and the first sentence about it."""
    sentence = re.split(r"(?<=[.!?])\s", description, maxsplit=1)[0]
    room = MAX_TEXT - len(name) - 2
    if len(sentence) > room:
        sentence = sentence[:room].rsplit(" ", 1)[0].rstrip(",;:") + "..."
    return f"{name}. {sentence}" if sentence else name
