"""What a reader of a format is given, and what it hands back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ratchet_client.images import MAX_BYTES
from streams.publish.folders import DatasetRow

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
"""File names of the formats that :mod:`ratchet_client.images` decodes."""
MAX_TEXT_BYTES: Final = 2**20
"""Longest text, JSON object or other field of a row that is read at all."""
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Source:
    """A data set to read."""

    path: Path
    """A file, a folder, or (shards alone) a pattern such as ``shards/{000..010}.tar``."""
    max_image_bytes: int = MAX_BYTES
    """A larger image is an error of its row; it is not read where its size is known before."""

    @property
    def domain(self) -> str:
        """Name of the data set: the domain of rows that have none of their own."""
        if self.path.is_dir():
            return self.path.resolve().name
        return self.path.parent.resolve().name if "{" in self.path.name else self.path.name.split(".")[0]


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of data set."""

    name: str
    holds: str
    """What it is, for people."""
    matches: Callable[[Path], bool]
    """Whether a path holds one. Reads a bounded part of it; never raises for what is in it."""
    read: Callable[[Source], Iterator[DatasetRow]]
    """Its rows, one at a time. Raises RecordError when nothing more of it can be read."""


def split_of(name: str) -> str:
    """The split that a file or folder is named after (``train`` in ``train-00000-of-00002``); empty if none."""
    match = _SPLIT.search(name.lower())
    return match.group(1) if match else ""


def files_under(root: Path, *suffixes: str) -> list[Path]:
    """Files with one of the suffixes in ``root`` and two levels below it, in order of their paths."""
    patterns = (f"{level}*{suffix}" for level in ("", "*/", "*/*/") for suffix in suffixes)
    return sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file())
