"""Shared parts of commands: common options, times, tables and JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def on_terminal() -> bool:
    return sys.stdin.isatty()


def _reason(context: typer.Context, given: str) -> str:
    if given or context.resilient_parsing:
        return given
    if not on_terminal():
        raise typer.BadParameter("--reason is required without a terminal to ask on.")
    return str(typer.prompt("Reason"))


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Reason = Annotated[
    str,
    typer.Option(
        "--reason", "-r", default_factory=str, show_default=False, callback=_reason,
        help="Why; kept in the audit log. Asked for at a terminal.",
    ),
]  # fmt: skip
ExpectedLive = Annotated[int | None, typer.Option(help="Refuse if another release is live by now.")]

_AGO: Final = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
SINCE_HELP: Final = "At or after this time: 2026-01-31, 2026-01-31T12:00:00Z (UTC without a zone), or 90m, 6h, 7d ago."

COLOURS: Final = {
    "ok": "green", "live": "green", "stable": "green", "passed": "green",
    "warn": "yellow", "inconclusive": "yellow",
    "fail": "red", "failed": "red", "rejected": "red",
    "collected": "dim",
}  # fmt: skip


def parse_since(text: str | None) -> datetime | None:
    """Parse a time or an age (``90m``). Raises typer.BadParameter."""
    if text is None:
        return None
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text[:40]!r} is not a time. {SINCE_HELP}") from None


def show_rows(
    rows: Iterable[Mapping[str, Any]], title: str, as_json: bool = False, *, data: Any = None, whole: Sequence[str] = ()
) -> None:
    """Print rows with equal keys as a table, or as JSON (``data`` if given). ``whole``: see :func:`table_of`."""
    if as_json:
        show_json(list(rows) if data is None else data)
    elif listed := list(rows):
        Console().print(table_of(listed, title, whole=whole))
    else:
        typer.echo(f"{title}: none")


def table_of(rows: Sequence[Mapping[str, Any]], title: str, *, whole: Sequence[str] = ()) -> Table:
    """A table of rows with equal keys. Columns in ``whole`` are never broken, so that names can be copied."""
    table = Table(title=Text(title) if title else None)
    for name, value in (rows[0] if rows else {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        table.add_column(
            name.replace("_", " "), justify="right" if number else "left", overflow="fold", no_wrap=name in whole
        )
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    return table


def write_images(folder: Path, images: Iterable[tuple[str, bytes]]) -> None:
    """Write images to a folder, which is made if needed, by their names without endings."""
    from ratchet_client.images import sniff

    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images:
        (folder / f"{name}.{(sniff(image) or 'bin').lower()}").write_bytes(image)


def sample_words(row: Mapping[str, Any]) -> str:
    """The beginning of a stored sample's text, or of its question and answer."""
    return str(row["text"] or f"{row['question']} -> {row['answer']}")[:200]


def show_facts(facts: Mapping[str, Any], title: str = "", as_json: bool = False) -> None:
    """Print facts about one thing, as lines or a JSON object."""
    if as_json:
        show_json(facts)
        return
    table = Table("", Column("", overflow="fold"), show_header=False, title=Text(title) if title else None)
    for name, value in facts.items():
        table.add_row(cell(name.replace("_", " ")), cell(value))
    Console().print(table)


def show_json(value: Any) -> None:
    """Print JSON; times are ISO 8601."""
    typer.echo(json.dumps(value, default=_plain, indent=2))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def cell(value: Any) -> Text:
    """A value as text without markup or terminal control characters. Times are in UTC."""
    match value:
        case Text():
            return value
        case None:
            text = ""
        case bool():
            text = "yes" if value else "no"
        case datetime():
            text = f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
        case int():
            text = f"{value:,}" if value >= 10_000 else str(value)  # release numbers can be copied
        case float():
            text = f"{value:,.3f}".rstrip("0").rstrip(".")
        case list() | tuple():
            text = ", ".join(map(str, value))
        case dict():
            text = facts_text(value)
        case _:
            text = str(value)
    return Text(printable(text), COLOURS.get(text, ""))


def facts_text(facts: Mapping[str, Any]) -> str:
    """One rounded fact per line, the reason first."""
    order = sorted(facts.items(), key=lambda item: item[0] != "reason")
    return "\n".join(f"{name}: {_short(value)}" for name, value in order if value is not None)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(round(value, 3) if isinstance(value, float) else value)


def printable(text: str) -> str:
    """Replace control characters other than line ends."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
