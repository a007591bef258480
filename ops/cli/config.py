"""``ratchet config`` and ``ratchet doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from core.loading import describe
from ops.cli import context as ctx
from ops.cli.checks import examine

app = typer.Typer(help="Show the settings and where each comes from.", no_args_is_help=True)


@app.command()
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the defaults.")] = False,
) -> None:
    """Every setting, its value, its origin and its meaning.

    Examples:  ratchet config show --changed    |    RATCHET_SERVE__PORT=9000 ratchet config show
    """
    rows = [row for row in describe(ctx.of(context).settings) if not changed or row[2] != "default"]
    if as_json:
        typer.echo(json.dumps({name: {"value": str(value), "origin": origin} for name, value, origin, _ in rows}))
        return
    table = Table(Column("setting", no_wrap=True), "value", "origin", "meaning", title="Settings")
    for name, value, origin, meaning in rows:
        style = "" if origin == "default" else "bold"
        table.add_row(name, Text(str(value)), Text(origin), meaning, style=style)
    Console().print(table)


def doctor(
    context: typer.Context,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure how the CLIP runs fastest here, and write it into the settings.")
    ] = False,
) -> None:
    """Say what is missing on this machine and how to fix it. Ends with status 1 if something must be fixed.

    Examples:  ratchet doctor    |    ratchet doctor --tune
    """
    if tune:
        from ops.cli.tune import run_tune

        run_tune(ctx.of(context))
        return
    marks = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}
    table = Table("", "what", "found", "fix", title="Doctor")
    findings = examine(ctx.of(context).settings)
    for finding in findings:
        table.add_row(marks[finding.state], *(Text(cell) for cell in (finding.what, finding.result, finding.fix)))
    Console().print(table)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)
