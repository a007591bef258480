"""Parquet files with images: Hugging Face data sets, and img2dataset's ``output_format=parquet``. Memory: one batch of
rows, some `BATCH_BYTES` by the file's own metadata, and the pages being decoded. Columns are read through a buffer, not
a row group at once.

The image column is the one declared in the schema's ``huggingface`` metadata, or one named ``image``, ``jpg``, ...; its
values are bytes, or structs of ``bytes`` and ``path``. ``ClassLabel`` numbers become the names in the metadata. Rows
that img2dataset could not download are bad rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from streams.publish.datasets.mapping import (
    COLUMNS,
    Format,
    ImageRef,
    Source,
    files_under,
    has_words,
    items_of,
    rows_of,
    split_of,
)
from streams.publish.folders import DatasetRow, FolderItem, Where, dataset_error, inside

IMAGE: Final = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
STATUS: Final = ("status", "error_message")
BATCH_BYTES: Final = 16 * 2**20
MAX_BATCH_ROWS: Final = 256
BUFFER_BYTES: Final = 2**20
_DAMAGE = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class _Layout:
    image: str
    columns: tuple[str, ...]
    label_names: dict[str, list[str]] = field(default_factory=dict)


def matches(path: Path) -> bool:
    if path.is_dir():
        try:
            first = next(iter(files_under(path, ".parquet")), None)
            return first is not None and _image_column(pq.read_schema(first)) is not None
        except _DAMAGE:
            return False
    return path.suffix.lower() == ".parquet"


def read(source: Source) -> Iterator[DatasetRow]:
    """Rows of all files. A damaged file yields one bad row; the next one is read."""
    files = files_under(source.path, ".parquet") if source.path.is_dir() else [source.path]
    for file in files:
        split = split_of(file.name) or split_of(file.parent.name)
        number = 0
        try:
            with pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as table:
                layout = _layout(table.schema_arrow, file)
                for batch, index in _raw_rows(table, layout):
                    number += 1
                    where = Where(file, f"row {number}")
                    yield from rows_of(where, _items(batch, index, layout, where, source, split))
        except _DAMAGE as error:
            where = Where(file, f"after row {number}")
            problem = f"damaged ({str(error)[:200] or type(error).__name__})"
            yield DatasetRow(str(where), where.row_error(problem, "copy the file again"))


def _raw_rows(table: pq.ParquetFile, layout: _Layout) -> Iterator[tuple[pa.RecordBatch, int]]:
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
        for batch in table.iter_batches(size, row_groups=[group], columns=list(layout.columns), use_threads=False):
            for index in range(batch.num_rows):
                yield batch, index


def _items(
    batch: pa.RecordBatch, index: int, layout: _Layout, where: Where, source: Source, split: str
) -> Iterator[FolderItem]:
    row = _values(batch, index, where)
    status, message = row.pop("status", None), row.pop("error_message", None)
    if isinstance(status, str) and status != "success":
        problem = f"was not downloaded: {status}{f' ({message})' if message else ''}"
        raise where.error(layout.image, problem[:300], "leave it out (--skip-bad), or download it again")
    image = _image(row.pop(layout.image), layout.image, where, source.max_image_bytes)
    yield from items_of(row, image, where, domain=source.domain, split=split, label_names=layout.label_names)


def _values(batch: pa.RecordBatch, index: int, where: Where) -> dict[str, Any]:
    name = ""
    row = {}
    try:
        for name in batch.schema.names:
            row[name] = batch.column(name)[index].as_py()
    except (pa.ArrowException, ValueError, ArithmeticError) as error:  # text that is not UTF-8, a time out of range
        raise where.error(name, f"cannot be read ({str(error)[:120]})", "correct it, or take the row out") from error
    return row


def _image(value: Any, column: str, where: Where, max_bytes: int) -> ImageRef:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    path = None
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes) and value:
        if len(value) > max_bytes:
            raise where.error(column, f"{len(value)} bytes, more than {max_bytes}", "shrink the image")
        return ImageRef(Path(f"{where.file.name}#{where.place.removeprefix('row ')}"), value)
    if isinstance(path, str) and path:
        inside(where.file.parent, path, where)
        return ImageRef(where.file.parent / path)
    raise where.error(column, "there is no image", "give its bytes, or take the row out")


def _layout(schema: pa.Schema, file: Path) -> _Layout:
    image, names = _image_column(schema), ", ".join(schema.names[:40])
    if image is None:
        raise dataset_error(f"{file} has no column of images; it has: {names}", "name the column with bytes 'image'")
    wanted = {*COLUMNS, *STATUS}
    columns = [name for name in schema.names if name != image and name.lower() in wanted]
    if not has_words(columns):
        fix = "name a column text, caption or label, or two question and answer"
        raise dataset_error(f"{file} has no column of texts; it has: {names}", fix)
    label_names = {
        name.lower(): [str(each) for each in feature["names"]]
        for name, feature in _features(schema).items()
        if name in columns and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
    return _Layout(image, (image, *columns), label_names)


def _image_column(schema: pa.Schema) -> str | None:
    declared = {name for name, feature in _features(schema).items() if feature.get("_type") == "Image"}
    by_name = {name.lower(): name for name in reversed(schema.names)}
    named = [by_name[name] for name in IMAGE if name in by_name]
    for name in [*(each for each in schema.names if each in declared), *named]:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            return str(name)
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


FORMAT: Final = Format("parquet", "Parquet with images (Hugging Face, img2dataset)", matches, read)
