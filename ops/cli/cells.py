"""Cells of tables on a terminal that hold texts from outside."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def add_texts(table: Table, *cells: str | None) -> None:
    """Add a row of texts from outside: no markup, and nothing that a terminal would act on."""
    table.add_row(*(Text(printable(cell or "")) for cell in cells))


def printable(text: str) -> str:
    """A text without control characters but line ends."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
