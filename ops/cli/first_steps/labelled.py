"""A labelled sample: pictures with a class or a caption each, from a folder or from a file that lists them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from core.digests import digest_bytes
from core.errors import ConfigError, RecordError
from core.progress import track
from core.settings.streams import Ingest
from ratchet_client.images import OpenedImage, open_image
from streams.publish.datasets import imagefolder
from streams.publish.datasets.mapping import Source
from streams.publish.folders import INDEX, DatasetRow, FolderItem

MAX_ROWS = 200_000
"""Rows that are listed: about 200 MB of names and texts."""
MAX_COPIED_BYTES = 2 * 2**30
"""Of all pictures that are copied together."""
FORMATS = "subfolders that are classes, a data.csv, or a metadata.csv; or name a CSV or JSON Lines file with --labels"


@dataclass(frozen=True)
class Picture:
    """One picture with all that is said about it."""

    digest: str
    """Of its bytes, 64 hex digits."""
    path: Path
    rows: tuple[FolderItem, ...]

    @property
    def label(self) -> str:
        """Its class; empty where it has none."""
        return self.rows[0].label


@dataclass
class LabelledSample:
    """What was read, in an order that depends on names alone."""

    name: str
    pictures: list[Picture] = field(default_factory=list)
    listed: int = 0
    """Pictures with a class or a caption; more than ``pictures`` where not all were needed."""
    unusable: list[str] = field(default_factory=list)
    """Why rows cannot be used."""


def read_sample(data: Path | None, labels: Path | None, bounds: Ingest, most: int) -> LabelledSample:
    """Read at most ``most`` pictures, drawn by a hash of their names.

    Args:
        data: the folder with the pictures; that of ``labels`` where it is None.
        labels: a CSV or JSON Lines file; what lies in ``data`` says it where it is None.
        bounds: on each picture: bytes, pixels and sides, as of a record.

    Raises:
        ConfigError: names the option that is wrong, and what to do.
    """
    option = "--labels" if labels else "--data"
    source = _source(data, labels)
    sample = LabelledSample(source.domain)
    by_path: dict[Path, list[FolderItem]] = defaultdict(list)
    try:
        for number, row in enumerate(_rows(source, labels)):
            if number >= MAX_ROWS:
                raise ConfigError(f"{option}: there are more than {MAX_ROWS:,} pictures.", "Name a part of them.")
            if isinstance(row.content, RecordError):
                sample.unusable.append(row.content.message)
            elif row.content.text:
                by_path[row.content.path].append(row.content)
    except (RecordError, OSError) as error:
        fix = error.fix if isinstance(error, RecordError) else "Check its permissions."
        raise ConfigError(f"{option}: {getattr(error, 'message', error)}", fix) from None
    sample.listed = len(by_path)
    drawn = sorted(by_path, key=lambda path: digest_bytes(_place(path, source).encode(errors="surrogateescape")))
    _open(sample, [(path, by_path[path]) for path in drawn[:most]], bounds)
    if not sample.pictures:
        why = f" The first: {sample.unusable[0]}" if sample.unusable else ""
        raise ConfigError(f"{option}: {source.path} has no picture that can be used.{why}", f"Give {FORMATS}.")
    return sample


def _source(data: Path | None, labels: Path | None) -> Source:
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data: {data} is no folder.", "Name the folder that holds the pictures.")
    if labels is None:
        if data is None:
            raise ConfigError("--data: there are no pictures.", "Name the folder that holds them.")
        return Source(data)
    if not labels.is_file() or labels.suffix.lower() not in (".csv", ".jsonl", ".ndjson"):
        raise ConfigError(
            f"--labels: {labels} is no CSV or JSON Lines file.",
            "Name one (.csv or .jsonl) with the columns file, and label or caption.",
        )
    return Source(data or labels.parent)


def _rows(source: Source, labels: Path | None) -> Iterator[DatasetRow]:
    listed = labels or (source.path / INDEX if (source.path / INDEX).is_file() else None)
    if listed is not None:
        return imagefolder.read_metadata(listed, source, source.path)
    return imagefolder.read(source)


def _place(path: Path, source: Source) -> str:
    return path.relative_to(source.path).as_posix()


def _open(sample: LabelledSample, drawn: list[tuple[Path, list[FolderItem]]], bounds: Ingest) -> None:
    """Look at the pictures themselves, and take the same one once."""
    taken: dict[str, Picture] = {}
    size = 0
    for path, rows in track(drawn, "looking at the pictures"):
        try:
            data = rows[0].bytes(bounds.max_image_bytes)
            _check(data, bounds)
        except RecordError as error:
            sample.unusable.append(f"{path}: {error.message}")
            continue
        digest = digest_bytes(data)
        old = taken.get(digest)
        if old is None and size + len(data) > MAX_COPIED_BYTES:
            break
        size += 0 if old else len(data)
        first = old.rows if old else ()
        taken[digest] = Picture(digest, old.path if old else path, _different((*first, *rows)))
    for picture in taken.values():
        if len({row.label for row in picture.rows}) > 1:
            sample.unusable.append(f"{picture.path}: the same picture has several classes.")
        else:
            sample.pictures.append(picture)


def _check(data: bytes, bounds: Ingest) -> None:
    opened: OpenedImage = open_image(data, bounds.max_pixels, bounds.max_image_bytes, bounds.min_side)
    opened.decode(lambda size: (min(size[0], 224), min(size[1], 224)))


def _different(rows: tuple[FolderItem, ...]) -> tuple[FolderItem, ...]:
    return tuple({(row.text, row.label): row for row in rows}.values())
