"""Handwritten digits of 8x8 pixels, ten classes, as scikit-learn ships them."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from PIL import Image

from demo.data.domain import Draft
from demo.data.packages import PackageError, read_members

_DATA: Final = "usr/lib/python3/dist-packages/sklearn/datasets/data/digits.csv.gz"
_SIDE: Final = 8
_LEVELS: Final = 16
LABELS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHRASES: Final = ("the digit {}", "a handwritten {}", "{}, written by hand", "the number {}")
_TEST_FROM: Final = 1197
"""The rows from here on are `test`: they are in the order of their writers."""


def digits(archive: Path) -> Iterator[Draft]:
    """Builder. A split is of pictures, not of concepts: every class is in both."""
    for _, content in read_members(archive, _DATA.__eq__):
        with gzip.open(io.BytesIO(content), "rt") as lines:
            for number, row in enumerate(csv.reader(lines)):
                yield _draft(archive, number, [int(float(value)) for value in row])
        return
    raise PackageError(f"{archive} has no {_DATA}.", "Delete it and run again to download it.")


def _draft(archive: Path, number: int, row: list[int]) -> Draft:
    *levels, digit = row
    if len(levels) != _SIDE**2 or not 0 <= digit < len(LABELS) or not all(0 <= level <= _LEVELS for level in levels):
        raise PackageError(f"{archive} is damaged: row {number} of the digits.", "Delete it and try again.")
    pixels = bytes(min(255, level * 256 // _LEVELS) for level in levels)
    split = "train" if number < _TEST_FROM else "test"
    return Draft(
        name=f"{split}-{number:05d}",
        text=_PHRASES[number % len(_PHRASES)].format(LABELS[digit]),
        concept=LABELS[digit],
        picture=partial(Image.frombytes, "L", (_SIDE, _SIDE), pixels),
        label=LABELS[digit],
        tags=("digit", "grey"),
        split=split,
    )
