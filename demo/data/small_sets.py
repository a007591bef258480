"""Builders of small sets: flags of countries, handwritten digits, Fashion-MNIST, and Tux Paint's stamps."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image

from demo.data.domain import Draft, concept_of, flag_concept
from demo.data.packages import MAX_MEMBER_BYTES, PackageError, read_members
from demo.data.render import decode

_FLAGS: Final = "usr/share/iso-flags-png-320x240/"
_COUNTRIES: Final = "usr/share/iso-codes/json/iso_3166-1.json"


def read_countries(iso_codes: Path) -> dict[str, tuple[str, ...]]:
    """Two-letter code in lower case -> names, the preferred one first."""
    for _, content in read_members(iso_codes, _COUNTRIES.__eq__):
        return {
            record["alpha_2"].casefold(): tuple(
                dict.fromkeys(_spoken(record[key]) for key in ("common_name", "name", "official_name") if key in record)
            )
            for record in json.loads(content)["3166-1"]
        }
    raise PackageError(f"{iso_codes} has no {_COUNTRIES}.", "Delete it and run again to download it.")


def _spoken(name: str) -> str:
    """`"Palestine, State of"` -> `"State of Palestine"`; other commas stay."""
    head, _, tail = name.partition(", ")
    if tail.endswith((" of", " of the")) or tail in ("British", "U.S."):
        return f"{tail} {head}"
    return name


def flags(iso_codes: Path, pictures: Path) -> Iterator[Draft]:
    """Builder for flags of countries, named by ISO 3166, without regions and organisations."""
    countries = read_countries(iso_codes)
    for name, content in read_members(pictures, lambda name: name.startswith(_FLAGS)):
        code = PurePosixPath(name).stem
        if code in countries:
            yield Draft(
                name=code,
                text=f"flag of {countries[code][0]}",
                concept=flag_concept(code),
                picture=partial(decode, content),
                tags=("flag", *countries[code][1:]),
            )


_DIGITS: Final = "usr/lib/python3/dist-packages/sklearn/datasets/data/digits.csv.gz"
_DIGIT_SIDE: Final = 8
_LEVELS: Final = 16
DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_PHRASES: Final = ("the digit {}", "a handwritten {}", "{}, written by hand", "the number {}")
_TEST_FROM: Final = 1197
"""First row of `test`: rows are in order of their writers."""


def digits(archive: Path) -> Iterator[Draft]:
    """Builder for scikit-learn's digits of 8x8 pixels. Every class is in both splits."""
    for _, content in read_members(archive, _DIGITS.__eq__):
        with gzip.open(io.BytesIO(content), "rt") as lines:
            for number, row in enumerate(csv.reader(lines)):
                yield _digit(archive, number, [int(float(value)) for value in row])
        return
    raise PackageError(f"{archive} has no {_DIGITS}.", "Delete it and run again to download it.")


def _digit(archive: Path, number: int, row: list[int]) -> Draft:
    *levels, digit = row
    if (
        len(levels) != _DIGIT_SIDE**2
        or not 0 <= digit < len(DIGITS)
        or not all(0 <= level <= _LEVELS for level in levels)
    ):
        raise PackageError(f"{archive} is damaged: row {number} of the digits.", "Delete it and try again.")
    pixels = bytes(min(255, level * 256 // _LEVELS) for level in levels)
    split = "train" if number < _TEST_FROM else "test"
    return Draft(
        name=f"{split}-{number:05d}",
        text=_DIGIT_PHRASES[number % len(_DIGIT_PHRASES)].format(DIGITS[digit]),
        concept=DIGITS[digit],
        picture=partial(Image.frombytes, "L", (_DIGIT_SIDE, _DIGIT_SIDE), pixels),
        label=DIGITS[digit],
        tags=("digit", "grey"),
        split=split,
    )


_FASHION: Final = "usr/share/datasets/fashion-mnist/"
_FASHION_SIDE: Final = 28
GARMENTS: Final = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_GARMENT_PHRASES: Final = ("a photo of {}", "a grey product photo of {}", "{}, on black", "a small picture of {}")
_PARTS: Final = (("train", "train", 400), ("t10k", "test", 100))
"""Original file prefix, split, and number of pictures per class: the first ones, 4,000 and 1,000 in total."""


def fashion(archive: Path) -> Iterator[Draft]:
    """Builder for grey 28 px pictures of clothes, as published (light on black), with the original splits."""
    files = dict(read_members(archive, lambda name: name.startswith(_FASHION)))
    for prefix, split, each in _PARTS:
        pixels = _read_idx(files, f"{prefix}-images-idx3-ubyte.gz", 16)
        classes = _read_idx(files, f"{prefix}-labels-idx1-ubyte.gz", 8)
        if len(pixels) != len(classes) * _FASHION_SIDE * _FASHION_SIDE or max(classes) >= len(GARMENTS):
            raise PackageError(f"{archive} is damaged: {prefix} does not add up.", "Delete it and try again.")
        taken: Counter[int] = Counter()
        for number, kind in enumerate(classes):
            if taken[kind] == each:
                continue
            taken[kind] += 1
            label = GARMENTS[kind]
            thing = label if label == "trousers" else f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
            start = number * _FASHION_SIDE * _FASHION_SIDE
            yield Draft(
                name=f"{split}-{number:05d}",
                text=_GARMENT_PHRASES[number % len(_GARMENT_PHRASES)].format(thing),
                concept=label,
                picture=partial(
                    Image.frombytes,
                    "L",
                    (_FASHION_SIDE, _FASHION_SIDE),
                    pixels[start : start + _FASHION_SIDE * _FASHION_SIDE],
                ),
                label=label,
                tags=("clothing", "grey"),
                split=split,
            )


def _read_idx(files: dict[str, bytes], name: str, header: int) -> bytes:
    """The data of an IDX file; its header is a magic number and the sizes, as big-endian 32-bit integers."""
    with gzip.open(io.BytesIO(files.get(_FASHION + name, b""))) as stream:
        data = stream.read(MAX_MEMBER_BYTES)
    if len(data) < header or struct.unpack(">I", data[:4])[0] not in (0x801, 0x803):
        raise PackageError(f"the package has no {name} in IDX format.", "Delete the archive and try again.")
    return data[header:]


_STAMPS: Final = "usr/share/tuxpaint/stamps/"
STAMP_LABELS: Final = {
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
"""By top folder; `symbols` (letters, digits, coins) is left out."""


def stamps(drawings: bool) -> Callable[..., Iterable[Draft]]:
    """Builder for the drawings, in folders named `cartoon`, or else for the photographs."""

    def build(archive: Path) -> Iterator[Draft]:
        texts: dict[str, str] = {}
        pictures: dict[str, bytes] = {}

        def wanted(name: str) -> bool:
            path = PurePosixPath(name.removeprefix(_STAMPS))
            return (
                name.startswith(_STAMPS)
                and path.parts[0] in STAMP_LABELS
                and path.suffix in (".txt", ".png")
                and ("cartoon" in path.parts) == drawings
            )

        for name, content in read_members(archive, wanted):
            path = PurePosixPath(name.removeprefix(_STAMPS))
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
                    label=STAMP_LABELS[stem.split("/")[0]],
                    tags=tuple(part for part in stem.split("/")[:-1] if part != "cartoon"),
                )

    return build
