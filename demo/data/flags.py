"""Flags of the world's countries, named by ISO 3166."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from demo.data.concepts import flag_concept
from demo.data.domain import Draft
from demo.data.packages import PackageError, read_members
from demo.data.render import decode

_FLAGS: Final = "usr/share/iso-flags-png-320x240/"
_COUNTRIES: Final = "usr/share/iso-codes/json/iso_3166-1.json"


def read_countries(iso_codes: Path) -> dict[str, tuple[str, ...]]:
    """Two-letter code in lower case -> names, the one to show first."""
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
    """Builder for the flags of countries; of regions and organisations are left out."""
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
