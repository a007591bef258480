"""Clip art as SVG: Open Clip Art Library, and game-icons."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from demo.data.domain import Draft, concept_of, flag_concept
from demo.data.packages import PackageError, read_members
from demo.data.render import draw_svg
from demo.data.small_sets import read_countries

_ROOT: Final = "usr/share/openclipart/svg/"
_SAMENESS: Final = ("shapes/stars/",)
"""1,378 generated stars with the same title."""
_DRAWN_ALIKE: Final = frozenset((
    "computer-icons-flat-theme-action-gear", "computer-icons-flat-theme-applications-dia",
    "computer-icons-flat-theme-applications-im-yahoo", "computer-icons-flat-theme-applications-package_wordprocessing",
    "computer-icons-flat-theme-applications-plan", "food-sugarbox_01",
    "signs_and_symbols-flags-australia_mike_honeychur_01", "signs_and_symbols-high_tension_danger_yve_r",
))  # fmt: skip
"""Test drawings that are also in the train split. Always left out, so that the test split is the same in any case."""
_TITLE: Final = re.compile(rb"<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
_CREATOR: Final = re.compile(rb"<dc:creator\b.*?<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
_SUBJECT: Final = re.compile(rb"<dc:subject[^>]*>(.*?)</dc:subject>", re.DOTALL)
_WORD: Final = re.compile(rb"<rdf:li[^>]*>([^<]*)</rdf:li>")
_HEAD_BYTES: Final = 65_536
"""Length of the part of a file that is searched for metadata."""
# fmt: off
_EMPTY_WORDS: Final = frozenset((
    "", "hash", "unsorted", "special", "theme", "icon", "icons", "lemon_theme_icon",
    "signs_and_symbols", "appicon", "united_nations_member", "ebay", "magick", "menu", "action",
    "mimetypes", "mime-types", "sign", "symbol",
))
# fmt: on
_PLAIN_WORDS: Final = {
    "mapsym": "map symbol",
    "roadsign": "road sign",
    "musicsym": "music symbol",
    "networksym": "network symbol",
    "signalflag": "signal flag",
    "led": "LED",
}
_CARD: Final = re.compile(r"[a-z]+_([cdhs])_(10|[2-9ajkq])")
_SUITS: Final = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS: Final = {"a": "ace", "j": "jack", "k": "king", "q": "queen"}
MAX_WORDS: Final = 3


def openclipart(iso_codes: Path, archive: Path) -> Iterator[Draft]:
    """Builder. The text is the title and up to three keywords: `"Grapes, food, fruit"`."""
    codes = {name.casefold(): code for code, names in read_countries(iso_codes).items() for name in names}

    def wanted(name: str) -> bool:
        return name.startswith(_ROOT) and name.endswith(".svg") and not name.removeprefix(_ROOT).startswith(_SAMENESS)

    for name, content in read_members(archive, wanted):
        path = PurePosixPath(name.removeprefix(_ROOT))
        draft_name = path.with_suffix("").as_posix().replace("/", "-")
        if draft_name in _DRAWN_ALIKE:
            continue
        head = content[:_HEAD_BYTES]
        title = _title(path.stem, _first(_TITLE, head), _first(_CREATOR, head))
        words = _words(head)
        if not re.search(r"[^\W\d_]{3}", title):
            continue
        concept = concept_of(re.sub(r"[\s\d]+$", "", title))
        if "flags" in path.parts and "flag" not in title.casefold():
            title = f"flag of {title}"
            code = codes.get(title.removeprefix("flag of ").casefold())
            concept = flag_concept(code) if code else concept_of(title)
        extra = [word for word in words if word.casefold() not in title.casefold()][:MAX_WORDS]
        yield Draft(
            name=draft_name,
            text=", ".join([title, *extra]),
            concept=concept,
            picture=partial(draw_svg, content, trim=True),
            tags=tuple(words),
        )


def _first(pattern: re.Pattern[bytes], head: bytes) -> str:
    match = pattern.search(head)
    return html.unescape(match[1].decode("utf-8", "replace")).strip() if match else ""


def _title(stem: str, title: str, creator: str) -> str:
    """The file's title, or its name if the title is that of a collection. A title is a file's own if half of its first
    words are in the name: `grapes_leif_lodahl_02` is "Grapes", but `crosswind` is not "SVG Road Signs". The author's
    name, often truncated (`ganson`), is removed from file names."""
    if card := _CARD.fullmatch(stem):
        return f"{_RANKS.get(card[2], card[2])} of {_SUITS[card[1]]}"
    title = re.sub(r"(?i)\s*-\s*rpg map elements.*$", "", " ".join(title.replace("_", " ").split()))
    squeezed = re.sub(r"[\W_]+", "", stem.casefold())
    first = re.findall(r"[^\W\d_]{3,}", title.casefold())[:3]
    if first and len(title) <= 80 and 2 * sum(word in squeezed for word in first) >= len(first):
        return title
    author = re.findall(r"\w{3,}", creator.casefold())
    head, *rest = re.sub(r"[\W_]+", " ", stem).split() or [""]
    title_words = [word for word in rest if len(word) < 3 or not any(a.startswith(word.casefold()) for a in author)]
    if head == "aiga" and title_words:
        head, *title_words = title_words
    return re.sub(r"[\s\d]*$", "", " ".join([head, *title_words])).strip()


def _words(head: bytes) -> list[str]:
    subject = _SUBJECT.search(head)
    matches = _WORD.findall(subject[1]) if subject else []
    words = (html.unescape(word.decode("utf-8", "replace")).strip() for word in matches)
    # Three and more words are an author's name or a remark.
    subjects = (
        word
        for word in words
        if word.casefold() not in _EMPTY_WORDS and len(word.split()) < 3 and re.search(r"[^\W\d_]{3}", word)
    )
    return sorted({_PLAIN_WORDS.get(word, word.replace("_", " ")) for word in subjects})


def icons(archive: Path) -> Iterator[Draft]:
    """Builder for sets of Iconify, without icons that depict nothing, such as `abstract-001`. A thing's `icon` and its
    `filled` drawing have the same concept."""
    for _, content in read_members(archive, "package/icons.json".__eq__):
        icons = json.loads(content)
        for name, icon in sorted(icons["icons"].items()):
            if name.startswith("abstract-"):
                continue
            width, height = (icon.get(side, icons.get(side, 512)) for side in ("width", "height"))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" color="black" '
                f'width="{width}" height="{height}">{icon["body"]}</svg>'
            )
            text = name.replace("-", " ")
            concept = concept_of(text.removesuffix(" icon").removesuffix(" filled"))
            yield Draft(name=name, text=text, concept=concept, picture=partial(draw_svg, svg.encode()))
        return
    raise PackageError(f"{archive} has no icons.json.", "Delete it and run again to download it.")
