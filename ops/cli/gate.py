"""``ratchet gate``: judge an adapter by hand, and find reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.cli import context as ctx
from ops.errors import GateError
from ops.ledger import Ledger

app = typer.Typer(help="Regression tests that an update must pass.", no_args_is_help=True)


@app.command()
def run(
    context: typer.Context,
    candidate: Annotated[str, typer.Argument(help="Adapter name, e.g. clip-0123456789ab.")],
    incumbent: Annotated[str | None, typer.Option(help="Adapter to compare with; the live one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("gate-report"),
) -> None:
    """Judge an adapter against the incumbent and the base, and write a report. Nothing is released.

    Example:  ratchet gate run clip-0123456789ab --out report/
    """
    from updater.gate import gate_command

    verdict = gate_command(ctx.of(context).settings, candidate, incumbent=incumbent, out=out)
    typer.echo(f"{verdict.outcome}: {out / 'report.html'}")
    if verdict.outcome != "passed":
        raise typer.Exit(1)


@app.command()
def report(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Update id; the newest verdict by default.")] = None,
) -> None:
    """Tell the verdict of an update and where its report lies.

    Example:  ratchet gate report
    """
    settings = ctx.of(context).settings
    ledger = Ledger.open(settings.ledger)
    newest = next(iter(ledger.verdicts(1)), None)
    verdict = ledger.verdict_of(update) if update else newest
    if verdict is None:
        raise GateError(
            f"no verdict of update {update!r}." if update else "there is no verdict yet.", "See `ratchet status`."
        )
    typer.echo(f"{verdict.outcome} {verdict.adapter} (update {verdict.update_id})")
    for name, suite in verdict.summary.get("suites", {}).items():
        typer.echo(f"  {name}: {suite['before']:.3f} -> {suite['after']:.3f} {suite['decision']}")
    typer.echo(f"{settings.artifacts}/{verdict.report_key}/report.html")
