"""Name, category and measured colours of the pictures of demo domains."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from PIL import Image

from core.progress import track
from demo.data import questions_words as words
from demo.data.domain import THREADS
from demo.data.domains import DOMAINS
from demo.data.emoji import emoji_codes
from demo.data.packages import PackageError, read_members
from demo.data.questions_make import Picture, colour_shares
from streams.publish.folders import FolderItem, read_folder

EMOJI: Final = ("noto", "twemoji", "openmoji")
_UNNAMED: Final = frozenset(("flag", "face", "person", "symbol", "hand", "clock", "arrow", ""))
"""Categories whose members need a sentence instead of a name."""
_SHORT: Final = re.compile(r"[a-z]+(?:[ -][a-z]+){0,2}")
_LEAD: Final = re.compile(r"^(?:an? |the |some |flag |pair |set |piece |of )+")
_BREAK: Final = re.compile(r"\s+(?:of|with|in|on|at|for|from|and|without|to|by|behind|showing|over)\s+|[,.;:!?(\[—]")
_WORDS: Final = re.compile(r"[\w’-]+")
MAX_TITLE: Final = 18


def read_pictures(home: Path, folders: dict[str, Path]) -> Iterator[Picture]:
    """Every distinct picture of the domains in `folders`. Pictures in both splits are left out of `test`."""
    subgroups = _subgroups(home)
    items = [(domain, item) for domain, folder in folders.items() for item in read_folder(folder)]
    items.sort(key=lambda pair: (pair[1].split == "test", pair[0], pair[1].path))
    seen: set[bytes] = set()

    def colours(pair: tuple[str, FolderItem]) -> tuple[bytes, dict[str, float]]:
        with Image.open(pair[1].path) as image:
            return hashlib.sha256(image.convert("RGB").tobytes()).digest(), colour_shares(image)

    with ThreadPoolExecutor(THREADS) as pool:
        measured = track(pool.map(colours, items), "measuring colours", total=len(items))
        for (domain, item), (digest, shares) in zip(items, measured, strict=True):
            if digest not in seen:
                seen.add(digest)
                yield _picture(domain, item, shares, subgroups)


def _picture(domain: str, item: FolderItem, colours: dict[str, float], subgroups: dict[str, str]) -> Picture:
    title, category = "", ""
    if domain in EMOJI:
        subgroup = subgroups.get(emoji_codes(item.path.stem), "")
        category = "" if item.concept in words.NOT_OF_KIND else words.SUBGROUPS.get(subgroup, "")
        text = item.text.casefold()
        named = category not in _UNNAMED or subgroup in _OBJECTS
        if named and len(text) <= MAX_TITLE and _SHORT.fullmatch(text) and not _people(text):
            title = text
    elif domain == "openclipart":
        beginnings = sorted(words.FOLDERS, key=len, reverse=True)
        category = next((words.FOLDERS[b] for b in beginnings if item.path.name.startswith(f"{b}-")), "")
    else:
        category = words.LABELS.get(domain, {}).get(item.label, "")
    related = frozenset(word for tag in item.tags for word in tag.casefold().split())
    name = "" if domain == "openclipart" and not category else basic_name(item.text, category)
    split = item.split or "train"
    return Picture(item.path, domain, item.concept, split, title, name, category, colours, related)


def basic_name(text: str, category: str) -> str:
    """The basic name of a thing that a text describes more closely; empty if there is none. `"a pair of army boots,
    worn"` -> `"shoe"`, `"cat with tears of joy"` -> `"cat"`, `"dog face"` -> `"dog"`."""
    plain = _LEAD.sub("", text.casefold().strip().removeprefix("flag: "))
    content = _WORDS.findall(_BREAK.split(plain, maxsplit=1)[0])
    if len(content) > 1 and content[-1] == "face" and category != "face":
        content.pop()
    return "" if not content or category == "person" else words.NOUNS.get(content[-1], "")


# fmt: off
_OBJECTS: Final = frozenset((
    "dishware", "sky-weather", "event", "award-medal", "sport", "game", "arts-crafts", "sound", "music", "phone",
    "computer", "light-video", "book-paper", "money", "mail", "writing", "office", "lock", "science", "medical",
    "household", "other-object", "place-geographic", "place-other", "body-parts", "face-costume", "hotel",
))
# fmt: on
"""Subgroups of emojibase without a category here whose members have good names."""


def _people(text: str) -> bool:
    return bool({"man", "woman", "person", "men", "women", "people"} & set(text.split()))


def _subgroups(home: Path) -> dict[str, str]:
    """Code of an emoji -> its subgroup in emojibase: `1F436` -> `animal-mammal`."""
    archive = DOMAINS["noto"].packages[0].fetch(home / "packages")
    files = dict(read_members(archive, ("package/en/data.json", "package/meta/groups.json").__contains__))
    if len(files) != 2:
        raise PackageError(f"{archive} has no groups of emoji.", "Delete it and run again to download it.")
    names = json.loads(files["package/meta/groups.json"])["subgroups"]
    records = json.loads(files["package/en/data.json"])
    return {emoji_codes(r["hexcode"]): names[str(r["subgroup"])] for r in records if "subgroup" in r}
