"""``ratchet gate``: judge an adapter by hand, and find reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.cli import context as ctx

app = typer.Typer(help="Regression tests that an update must pass.", no_args_is_help=True)


@app.command()
def run(
    context: typer.Context,
    candidate: Annotated[str, typer.Argument(help="Adapter name, e.g. clip-0123456789ab, or its directory.")],
    incumbent: Annotated[
        str | None, typer.Option(help="Adapter to compare with, or 'base'; the live one by default.")
    ] = None,
    suites: Annotated[
        list[Path] | None, typer.Option(help="Suite YAML files or folders, instead of gate.suites.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; home/gate/NAME by default.")] = None,
) -> None:
    """Judge an adapter against the incumbent and the base, and write a report. Nothing is released.

    Examples:  ratchet gate run clip-0123456789ab    |    ratchet gate run my-adapter/ --incumbent base --out report/
    """
    from updater.gate.command import gate_command

    verdict, page = gate_command(
        ctx.of(context).settings, candidate, incumbent=incumbent, suites=suites or None, out=out
    )
    typer.echo(f"{verdict.outcome}: {'; '.join(verdict.reasons)}\n{page}")
    if verdict.outcome != "passed":
        raise typer.Exit(1)


@app.command()
def report(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Update id; the newest verdict by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to put it in; home/gate/UPDATE by default.")] = None,
) -> None:
    """Bring the report of an update to a local folder and tell where its page is.

    Example:  ratchet gate report
    """
    from updater.gate.command import report_command

    typer.echo(report_command(ctx.of(context).settings, update, out=out))
