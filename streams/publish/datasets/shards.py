"""WebDataset shards: tar files in which adjacent members with one name form a sample (``000.jpg``, ``000.txt``,
``000.json``). Read are an image (jpg, jpeg, png, webp, gif, bmp), ``txt``, ``cls`` and ``json`` (columns as in
:mod:`streams.publish.datasets.mapping`). Other members are skipped unread, and nothing is unpickled. The class names of
``cls`` are the lines of ``classes.txt`` or ``classnames.txt`` next to the shards. Memory: one sample, at most an image
and three texts."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from lzma import LZMAError
from math import prod
from pathlib import Path
from typing import Any, Final

from streams.publish.datasets.mapping import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Format,
    ImageRef,
    Source,
    files_under,
    items_of,
    rows_of,
    split_of,
)
from streams.publish.folders import DatasetRow, FolderItem, Where, dataset_error

SUFFIXES: Final = (".tar", ".tar.gz", ".tgz")
MAX_HEADER_BYTES: Final = 2**20
"""Longest extended header of a member, which Python's tarfile reads whole."""
MAX_SHARDS: Final = 100_000
_PARTS: Final = {"txt": "txt", "text": "txt", "caption": "txt", "cls": "cls", "json": "json"}
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_BRACES = re.compile(r"\{[^{}]*\}")
_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, LZMAError)


class _BoundedTarInfo(tarfile.TarInfo):
    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.size < 0 or (not self.isreg() and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass(slots=True)
class _Group:
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    problem: tuple[str, str, str] | None = None


def expand(path: Path) -> list[Path]:
    """Expand braces in a pattern: ``{000..010}`` counts, ``{a,b}`` lists. Raises RecordError."""
    text = str(path)
    choices = [_choices(brace, path) for brace in _BRACES.findall(text)]
    if (count := prod(len(choice) for choice in choices)) > MAX_SHARDS:
        raise dataset_error(f"{path} names {count} shards", f"name at most {MAX_SHARDS} at once")
    literals = _BRACES.split(text)
    return [Path("".join(map("".join, zip(literals, (*chosen, ""), strict=True)))) for chosen in product(*choices)]


def _choices(brace: str, path: Path) -> list[str]:
    numbers = _RANGE.fullmatch(brace)
    if numbers is None:
        return brace[1:-1].split(",")
    first, last = numbers.groups()
    if not 0 <= int(last) - int(first) < MAX_SHARDS:
        raise dataset_error(f"{brace} in {path} is not a range", f"write the lower number first, {MAX_SHARDS} at most")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _shards_of(path: Path) -> list[Path]:
    if path.is_dir():
        return files_under(path, *SUFFIXES)
    shards = [path] if path.is_file() else expand(path)
    for shard in shards:
        if not shard.is_file():
            raise dataset_error(f"{shard} does not exist", "name shards that are there")
    return shards


def matches(path: Path) -> bool:
    return bool(files_under(path, *SUFFIXES)) if path.is_dir() else path.name.lower().endswith(SUFFIXES)


def read(source: Source) -> Iterator[DatasetRow]:
    """Samples of all shards. A damaged shard yields one bad row; the next one is read."""
    for shard in _shards_of(source.path):
        classes = {"label": _class_names(shard.parent)}
        try:
            for group in _groups(shard, source.max_image_bytes):
                where = Where(shard, f"sample {group.key[:200]}")
                yield from rows_of(where, _items(group, where, source.domain, classes))
        except _DAMAGE as error:
            where = Where(shard, "whole file")
            damage = str(error)[:200] or type(error).__name__
            yield DatasetRow(str(where), where.row_error(f"damaged ({damage})", "copy it again"))


def _groups(shard: Path, max_image_bytes: int) -> Iterator[_Group]:
    group = _Group("")
    with tarfile.open(shard, "r|*", tarinfo=_BoundedTarInfo) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # or it remembers each one
            folder, _, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not member.isreg() or not stem or not dot:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if group.key != key:
                yield group
                group = _Group(key)
            _take(group, extension.lower(), member, tar, max_image_bytes)
    yield group


def _take(group: _Group, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile, max_image_bytes: int) -> None:
    part = "image" if f".{extension}" in IMAGE_SUFFIXES else _PARTS.get(extension)
    if group.problem or part is None:
        return
    limit = max_image_bytes if part == "image" else MAX_TEXT_BYTES
    if part in group.parts:
        group.problem = (part, "the sample has two", "give each sample a name of its own")
    elif member.size > limit:
        group.problem = (part, f"{member.size} bytes, more than {limit}", "shrink it, or take the sample out")
    else:
        stream = tar.extractfile(member)
        group.parts[part] = stream.read() if stream is not None else b""


def _items(group: _Group, where: Where, domain: str, classes: dict[str, list[str]]) -> Iterator[FolderItem]:
    if not group.parts and group.problem is None:
        return  # no member belongs to a sample: __key__ files, licences
    if group.problem is not None:
        raise where.error(*group.problem)
    image = group.parts.get("image")
    if image is None:
        raise where.error("image", "there is none", f"add a member {group.key}.jpg (or png, webp)")
    name = ImageRef(Path(f"{where.file.name}#{group.key}"), image)
    split = split_of(where.file.name) or split_of(where.file.parent.name)
    yield from items_of(values_of(group.parts, where), name, where, domain=domain, split=split, label_names=classes)


def values_of(parts: dict[str, bytes], where: Where) -> dict[str, Any]:
    """Columns of a sample's members ``txt``, ``cls`` and ``json``. Raises RecordError."""
    row: dict[str, Any] = {}
    if "json" in parts:
        try:
            row = json.loads(parts["json"])
        except (ValueError, RecursionError) as error:
            raise where.error("json", f"not JSON: {str(error)[:120]}", "write an object in UTF-8") from error
        if not isinstance(row, dict):
            raise where.error("json", f"holds a {type(row).__name__}", "write an object")
    for part, column in (("txt", "text"), ("cls", "label")):
        if part in parts:
            try:
                text = parts[part].decode().strip()
            except UnicodeDecodeError as error:
                raise where.error(part, "is not UTF-8", "encode it as UTF-8") from error
            number = part == "cls" and text.isdecimal() and len(text) < 10
            row[column] = int(text) if number else text
    return row


def _class_names(folder: Path) -> list[str]:
    for name in ("classes.txt", "classnames.txt"):
        if (folder / name).is_file() and (folder / name).stat().st_size <= MAX_TEXT_BYTES:
            return (folder / name).read_text("utf-8", errors="replace").splitlines()
    return []


FORMAT: Final = Format("webdataset", "tar shards (WebDataset, img2dataset)", matches, read)
