"""``ratchet audit``: who did what to which, when and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from core.ledger import Ledger
from ops.cli import context as ctx


def audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most rows.")] = 50,
    subject: Annotated[
        str | None, typer.Option(help="Only rows about it: 'release 12', 'key ann', or 'release' for all of them.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="Only what this one did; a key's actor reads key:NAME.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, newest first.")] = False,
) -> None:
    """Every action of operators and of Ratchet itself, newest first.

    Examples:  ratchet audit --limit 10    |    ratchet audit --subject "release 12"    |    ... --actor key:ann
    """
    rows = Ledger.open(ctx.of(context).settings.ledger).audit_rows(limit, subject, actor)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], default=str, indent=2))
        return
    table = Table("when (UTC)", "who", "did", "to", Column("details", overflow="fold"), title="Audit")
    for row in rows:
        when = f"{row.created_at:%Y-%m-%d %H:%M:%S}" if row.created_at else ""
        table.add_row(*(Text(cell) for cell in (when, row.actor, row.action, row.subject, lines(row.detail))))
    Console().print(table)


def lines(detail: dict[str, Any]) -> str:
    """One fact a line: the reason first, then what else is known. Numbers are cut to what somebody reads."""
    order = sorted(detail.items(), key=lambda item: item[0] != "reason")
    return "\n".join(f"{name}: {_short(value)}" for name, value in order if value is not None)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(round(value, 3) if isinstance(value, float) else value)
