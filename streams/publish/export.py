"""Export of samples as a folder with ``data.csv``, a Parquet file, or a WebDataset shard, all readable by
``ratchet publish``. Written as a stream, with a few images in memory, and given the target's name only when complete
(in a folder, ``data.csv`` comes last)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import ConfigError
from core.files import replacing
from ratchet_client.images import sniff
from streams.publish.folders import FolderItem, write_folder, writing
from streams.store.rows import SAMPLE_SCHEMA
from streams.store.sample_queries import SampleFilter, stream_samples
from streams.store.sample_store import SampleStore

SampleRow = Mapping[str, Any]
GROUP_BYTES: Final = 16 << 20
"""Image bytes per row group of a Parquet file: what a reader holds in memory."""
GROUP_ROWS: Final = 1024
_SUFFIXES: Final[Mapping[str | None, str]] = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_FIELDS: Final = (
    "id", "text", "question", "answer", "domain", "source", "concept", "label", "tags", "split", "time", "extra",
)  # fmt: skip
_IMAGE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PARQUET: Final = pa.schema([("image", _IMAGE), *(SAMPLE_SCHEMA.field(name) for name in _FIELDS)]).with_metadata(
    {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
)


def export(
    store: SampleStore,
    path: Path,
    which: SampleFilter | None = None,
    *,
    version: int | None = None,
    follow: Callable[[Iterable[SampleRow]], Iterator[SampleRow]] = iter,
) -> int:
    """Write samples to ``path``: ``.parquet`` a Parquet file, ``.tar`` a shard, any other name a folder, which may
    exist if empty. Returns their number. ``version``: of the store; default: the newest at the start. Raises
    ConfigError if the path exists, or cannot be written; StoreUnavailable if the store cannot be read now."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} is there already.", "Name a path that is not there yet.")
    count = 0

    def counted() -> Iterator[SampleRow]:
        nonlocal count
        rows = stream_samples(store, which or SampleFilter(), store.version() if version is None else version)
        for row in follow(rows):
            yield row
            count += 1

    write = {".parquet": _write_parquet, ".tar": _write_tar}.get(path.suffix.lower())
    with writing(path, "Make room, or name another."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, counted()) if write else write_folder(path, map(_item, counted()))
    return count


def image_name(row: SampleRow) -> str:
    return f"{row['id']}.{_SUFFIXES.get(sniff(row['image']), 'bin')}"


def _item(row: SampleRow) -> FolderItem:
    names = ("text", "label", "concept", "split", "domain", "source", "question", "answer")
    texts: dict[str, Any] = {name: row[name] or "" for name in names}
    return FolderItem(
        path=Path("images", row["id"][:2], image_name(row)),
        time=_time(row) or "",
        tags=tuple(row["tags"] or ()),
        inline=row["image"],
        **texts,
    )


def _write_tar(path: Path, rows: Iterator[SampleRow]) -> None:
    with replacing(path) as partial, tarfile.open(partial, "w") as tar:
        for row in rows:
            values = {**{name: row[name] for name in _FIELDS if row[name]}, "time": _time(row)}
            _add(tar, image_name(row), row["image"])
            _add(tar, f"{row['id']}.json", json.dumps(values).encode())
            tar.members.clear()  # type: ignore[attr-defined]  # or it remembers each one


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_parquet(path: Path, rows: Iterator[SampleRow]) -> None:
    with replacing(path) as partial, pq.ParquetWriter(partial, _PARQUET) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            image = {"bytes": row["image"], "path": image_name(row)}
            group.append({**{name: row[name] for name in _FIELDS}, "image": image})
            size += len(row["image"])
            if size >= GROUP_BYTES or len(group) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema=_PARQUET))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=_PARQUET))


def _time(row: SampleRow) -> str | None:
    return row["time"].isoformat() if row["time"] else None
