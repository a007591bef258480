"""``ratchet gate``: judge an adapter by hand, and find reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ops.cli import context as ctx
from ops.cli.cells import add_texts, printable

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
    from updater.gate.gate_command import gate_command
    from updater.gate.verdict import diagnostics_lines

    verdict, page = gate_command(
        ctx.of(context).settings, candidate, incumbent=incumbent, suites=suites or None, out=out
    )
    typer.echo(f"{verdict.outcome}: {'; '.join(verdict.reasons)}\n{page}")
    for line in diagnostics_lines(verdict.summary()["diagnostics"]):
        typer.echo(printable(line))
    if verdict.outcome != "passed":
        raise typer.Exit(1)


@app.command()
def pairs(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="A retrieval suite, e.g. emoji_retrieval or fresh.fluent3d.")],
    limit: Annotated[int, typer.Option(min=1, max=150, help="Most pairs.")] = 20,
) -> None:
    """List images that the CLIP base cannot tell apart, though their captions differ; the most similar first.

    Example:  ratchet gate pairs emoji_retrieval
    """
    from updater.gate.gate_command import pairs_command

    listed = pairs_command(ctx.of(context).settings, suite)
    table = Table(
        "images", "captions", "first", "second", title=f"{len(listed)} pairs of {suite} (cosines by the base)"
    )
    for each in listed[:limit]:
        cosines = f"{each.image_similarity:.3f}", f"{each.text_similarity:.3f}"
        add_texts(table, *cosines, *(f"{item.text[:200]}\n{item.name}" for item in (each.first, each.second)))
    Console().print(table)


@app.command()
def report(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Update id; the newest verdict by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to put it in; home/gate/UPDATE by default.")] = None,
) -> None:
    """Bring the report of an update to a local folder and tell where its page is.

    Example:  ratchet gate report
    """
    from updater.gate.gate_command import report_command

    typer.echo(report_command(ctx.of(context).settings, update, out=out))
