"""Tux Paint's stamps: photographs of things on white, and drawings, each with a line of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from demo.data.concepts import concept_of
from demo.data.domain import Draft
from demo.data.packages import read_members
from demo.data.render import decode

_ROOT: Final = "usr/share/tuxpaint/stamps/"
LABELS: Final = {
    "animals": "animal",
    "clothes": "clothing",
    "food": "food",
    "hobbies": "hobby",
    "household": "household object",
    "medical": "medical equipment",
    "military": "military equipment",
    "naturalforces": "force of nature",
    "people": "person",
    "plants": "plant",
    "seasonal": "holiday decoration",
    "space": "outer space",
    "sports": "sports equipment",
    "town": "building or road sign",
    "vehicles": "vehicle",
}
"""By top folder. `symbols` (letters, digits, coins) is left out."""


def stamps(drawings: bool) -> Callable[..., Iterable[Draft]]:
    """Builder for the drawings, which are in folders named `cartoon`, or else for the photographs."""

    def build(archive: Path) -> Iterator[Draft]:
        texts: dict[str, str] = {}
        pictures: dict[str, bytes] = {}

        def wanted(name: str) -> bool:
            path = PurePosixPath(name.removeprefix(_ROOT))
            return (
                name.startswith(_ROOT)
                and path.parts[0] in LABELS
                and path.suffix in (".txt", ".png")
                and ("cartoon" in path.parts) == drawings
            )

        for name, content in read_members(archive, wanted):
            path = PurePosixPath(name.removeprefix(_ROOT))
            stem = path.with_suffix("").as_posix()
            if path.suffix == ".png":
                pictures[stem] = content
            else:
                # The first line is English; the others are translations.
                texts[stem] = content.decode("utf-8", "replace").partition("\n")[0].strip()
        for stem in sorted(pictures.keys() & texts.keys()):
            if text := texts[stem].rstrip("."):
                yield Draft(
                    name=stem.replace("/", "-"),
                    text=text,
                    concept=concept_of(re.split(r"[.,;:!?(—]", text, maxsplit=1)[0] or text),
                    picture=partial(decode, pictures[stem]),
                    label=LABELS[stem.split("/")[0]],
                    tags=tuple(part for part in stem.split("/")[:-1] if part != "cartoon"),
                )

    return build
