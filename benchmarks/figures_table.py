"""The figures of a benchmark, as people and machines read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show_figures(title: str, figures: Mapping[str, Any], note: str = "") -> None:
    """Print a table of two columns for people, a note, and one JSON line for machines (last)."""
    table = Table(show_header=False, title=title)
    for name, value in figures.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console().print(table)
    if note:
        print(note)
    print(json.dumps(figures), flush=True)
