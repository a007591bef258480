"""The command of every benchmark: the parser of its flags, and its figures as people and machines read them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def bench_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """For ``ratchet bench NAME``, described by the first line of a module's docstring."""
    return argparse.ArgumentParser(prog=f"ratchet bench {name}", description=(doc or "").partition("\n")[0])


def show_table(table: Table, figures: Mapping[str, Any], note: str = "") -> None:
    """Print a table for people, a note, and one JSON line for machines (last)."""
    Console().print(table)
    if note:
        print(note)
    print(json.dumps(figures), flush=True)


def show_figures(title: str, figures: Mapping[str, Any], note: str = "") -> None:
    """The same with a table of two columns: the figures themselves."""
    table = Table(show_header=False, title=title)
    for name, value in figures.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    show_table(table, figures, note)
