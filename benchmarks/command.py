"""The argument parser and the output shared by all benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def bench_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of ``ratchet bench NAME``, described by the first line of a module's docstring."""
    return argparse.ArgumentParser(prog=f"ratchet bench {name}", description=(doc or "").partition("\n")[0])


def show_table(table: Table, figures: Mapping[str, Any], note: str = "") -> None:
    """Print a table, a note and, as the last line, JSON."""
    Console().print(table)
    if note:
        print(note)
    print(json.dumps(figures), flush=True)


def show_figures(title: str, figures: Mapping[str, Any], note: str = "") -> None:
    """Print the figures themselves as a table of two columns, a note and JSON."""
    table = Table(show_header=False, title=title)
    for name, value in figures.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    show_table(table, figures, note)
