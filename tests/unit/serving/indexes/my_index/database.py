"""A database in memory, as somebody else's: tables of rows, and the spaces and the name that an index adds."""

from __future__ import annotations

from typing import Any

from serving.indexes.store import Vector

tables: dict[str, dict[str, dict[str, Any]]] = {}
views: dict[str, tuple[str, str]] = {}
"""Table and space by name."""


def clear(table: str) -> None:
    tables[table] = {}
    views.clear()


def upsert(table: str, id: str, image: str) -> None:
    tables[table][id] = {"image": image, "vectors": {}, "skip": None}


def delete(table: str, id: str) -> None:
    del tables[table][id]


def view(name: str) -> tuple[str, dict[str, Vector]]:
    table, space = views[name]
    return space, {id: row["vectors"][space] for id, row in tables[table].items() if space in row["vectors"]}
