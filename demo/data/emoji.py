"""Emoji sets: the same meanings in several styles; labels and tags from emojibase."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image

from demo.data.domain import Draft, concept_of, flag_concept
from demo.data.packages import PackageError, read_members
from demo.data.render import decode, draw_svg

_LABELS: Final = "package/en/data.json"
_REGIONAL_A: Final = 0x1F1E6


@dataclass(frozen=True, slots=True)
class Emoji:
    """A base emoji (no skin tone) as emojibase describes it."""

    code: str
    """Code points in hex, joined by `-`, without variation selectors."""
    label: str
    text: str
    concept: str
    tags: tuple[str, ...]


def emoji_codes(name: str) -> str:
    """`0023-fe0f-20e3` -> `23-20E3`: sets disagree on leading zeros, case and variation selectors."""
    parts = [part.upper().lstrip("0") for part in name.split("-")]
    return "-".join(part for part in parts if part != "FE0F")


def read_emoji(emojibase: Path) -> dict[str, Emoji]:
    """Emoji by code, without regional letters and skin-tone components, which depict nothing."""
    for _, content in read_members(emojibase, _LABELS.__eq__):
        records = json.loads(content)
        return {
            emoji.code: emoji
            for emoji in map(_emoji, (r for r in records if r.get("group") is not None and r["group"] != 2))
        }
    raise PackageError(f"{emojibase} has no {_LABELS}.", "Delete it and run again to download it.")


def _emoji(record: dict[str, object]) -> Emoji:
    label = str(record["label"])
    code = emoji_codes(str(record["hexcode"]))
    tags = record.get("tags")
    text, concept = label, concept_of(label)
    if label.startswith("flag: "):
        text = f"flag of {label.removeprefix('flag: ')}"
        concept = concept_of(text)
        points = [int(part, 16) - _REGIONAL_A for part in code.split("-")]
        if len(points) == 2 and all(0 <= point < 26 for point in points):
            concept = flag_concept("".join(chr(ord("a") + point) for point in points))
    return Emoji(
        code=code,
        label=label,
        text=re.sub(r"^keycap: ", "keycap ", text),
        concept=concept,
        tags=tuple(map(str, tags)) if isinstance(tags, list) else (),
    )


def by_code(folder: str, picture: Callable[[bytes], Image.Image] = decode) -> Callable[..., Iterable[Draft]]:
    """Builder for a set whose files in `folder` are named by code points."""

    def build(emojibase: Path, pictures: Path) -> Iterator[Draft]:
        known = read_emoji(emojibase)
        seen: set[str] = set()
        for name, content in read_members(pictures, lambda name: name.startswith(folder)):
            emoji = known.get(emoji_codes(PurePosixPath(name).stem))
            if emoji is not None and emoji.code not in seen:
                seen.add(emoji.code)
                yield draft(emoji, partial(picture, content))

    return build


def by_label(folder: str) -> Callable[..., Iterable[Draft]]:
    """Builder for a set of SVGs in `folder` named by label: `a-button-blood-type.svg`."""

    def build(emojibase: Path, pictures: Path) -> Iterator[Draft]:
        known = {_slug(emoji.label): emoji for emoji in read_emoji(emojibase).values()}
        for name, content in read_members(pictures, lambda name: name.startswith(folder)):
            emoji = known.get(PurePosixPath(name).stem)
            if emoji is not None:
                yield draft(emoji, partial(draw_svg, content))

    return build


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.casefold()).strip("-")


def draft(emoji: Emoji, picture: Callable[[], Image.Image]) -> Draft:
    return Draft(name=emoji.code.lower(), text=emoji.text, concept=emoji.concept, picture=picture, tags=emoji.tags)
