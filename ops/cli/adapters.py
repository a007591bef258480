"""``ratchet adapters``: adapters from elsewhere, and for elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.cli import context as ctx

app = typer.Typer(help="Take adapters in from PEFT directories, and write them out.", no_args_is_help=True)


@app.command("import")
def import_(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(help="Directory with adapter_config.json and adapter_model.safetensors.", metavar="DIR")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base that it was trained for; needed where no ratchet.json says so.")
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Run the gate now, in this process, instead of in the updater.")
    ] = False,
) -> None:
    """Check a LoRA adapter that was trained elsewhere, store it, and let the updater judge and propose it.

    Nothing is released that the gate does not pass. The same adapter again is told as known.

    Examples:  ratchet adapters import my-adapter/ --base shipped    |    ratchet adapters import exported/ --judge
    """
    from updater.service.exchange import gate_import, import_adapter

    settings = ctx.of(context).settings
    imported = import_adapter(settings, directory, actor=ctx.person(), base=base)
    update, verb = imported.update, "is known" if imported.known else "is stored"
    typer.echo(f"{update.adapter} {verb}: {update.id} ({update.state})")
    if not judge:
        if update.state == "trained":
            typer.echo("the updater judges it next; --judge does it at once")
        return
    update, verdict = gate_import(settings, imported)
    reasons = f": {'; '.join(map(str, verdict.summary.get('reasons', [])))}" if verdict else ""
    typer.echo(f"{verdict.outcome if verdict else update.state}{reasons}{f' ({update.error})' if update.error else ''}")
    if verdict is None or verdict.outcome != "passed" or update.state != "done":
        raise typer.Exit(1)


@app.command()
def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of an adapter, e.g. clip-0123456789ab.")],
    directory: Annotated[Path, typer.Argument(help="New directory to write.", metavar="DIR")],
) -> None:
    """Write an adapter as a PEFT directory with a model card; `import` takes it back as the same adapter.

    Example:  ratchet adapters export clip-0123456789ab colours/
    """
    from updater.service.exchange import export_adapter

    typer.echo(export_adapter(ctx.of(context).settings, name, directory))
