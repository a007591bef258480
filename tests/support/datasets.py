from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import RecordError
from streams.publish.datasets import read_dataset
from streams.publish.folders import FolderItem


def items_and_errors(path: Path | str, **options: Any) -> tuple[list[FolderItem], list[RecordError]]:
    items: list[FolderItem] = []
    errors: list[RecordError] = []
    for row in read_dataset(path, **options):
        if isinstance(row.content, RecordError):
            errors.append(row.content)
        else:
            items.append(row.content)
    return items, errors


def items_of(path: Path | str, **options: Any) -> list[FolderItem]:
    items, errors = items_and_errors(path, **options)
    assert not errors
    return items


def error_of(path: Path | str, **options: Any) -> RecordError:
    [error] = items_and_errors(path, **options)[1]
    assert error.fix
    return error
