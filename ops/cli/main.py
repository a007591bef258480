"""``ratchet``: one command for every part."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from core.errors import RatchetError
from core.log_format import writes_json
from core.logs import configure_logging
from core.stop_signals import Stopped
from ops.cli import (
    adapters,
    audit,
    bases,
    bench,
    check,
    config,
    data,
    gate,
    gc,
    ingest,
    init,
    keys,
    ledger,
    metrics,
    parts,
    plan,
    recovery,
    releases,
    resubmit,
    samples,
    status,
    update,
)
from ops.cli.context import Context

log = logging.getLogger("ratchet.cli")
app = typer.Typer(
    name="ratchet",
    help="A model server that keeps learning and never slips back.",
    epilog="Start with [bold]ratchet demo[/bold], or [bold]ratchet init[/bold] with your own model and data. "
    "[bold]ratchet doctor[/bold] says what is missing on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def configure(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings file; ratchet.yaml in this folder by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. --set serve.port=9000; repeatable.")
    ] = None,
) -> None:
    """A model server that keeps learning and never slips back."""
    context.obj = Context(file, settings or [], context.invoked_subcommand or "ratchet")


app.command(rich_help_panel="Run")(init.init)
app.command(rich_help_panel="Run")(parts.up)
app.command(rich_help_panel="Run")(parts.demo)
app.command(rich_help_panel="Parts")(parts.serve)
app.add_typer(ingest.app, name="ingest", rich_help_panel="Parts")
app.command(rich_help_panel="Parts")(parts.maintain)
app.add_typer(update.app, name="update", rich_help_panel="Parts")
app.command(rich_help_panel="Parts")(parts.console)
app.command(rich_help_panel="Parts")(parts.broker)
app.command(rich_help_panel="Data and models")(data.publish)
app.add_typer(data.app, name="data", rich_help_panel="Data and models")
app.add_typer(samples.app, name="samples", rich_help_panel="Data and models")
app.add_typer(bases.app, name="base", rich_help_panel="Data and models")
app.add_typer(adapters.app, name="adapters", rich_help_panel="Data and models")
app.command(rich_help_panel="Operate")(status.status)
app.command(rich_help_panel="Operate")(check.check)
app.add_typer(releases.app, name="releases", rich_help_panel="Operate")
app.add_typer(gate.app, name="gate", rich_help_panel="Operate")
app.command(rich_help_panel="Operate")(resubmit.resubmit)
app.command(name="gc", rich_help_panel="Operate")(gc.collect)
app.command(rich_help_panel="Operate")(recovery.backup)
app.command(rich_help_panel="Operate")(recovery.restore)
app.add_typer(keys.app, name="keys", rich_help_panel="Operate")
app.command(rich_help_panel="Operate")(audit.audit)
app.add_typer(ledger.app, name="ledger", rich_help_panel="Operate")
app.add_typer(metrics.app, name="metrics", rich_help_panel="Operate")
app.add_typer(config.app, name="config", rich_help_panel="Operate")
app.command(rich_help_panel="Operate")(config.doctor)
app.command(rich_help_panel="Operate")(plan.plan)
app.command(
    rich_help_panel="Operate",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench.bench)


def main() -> None:
    """Run the command line; a known error is shown without a traceback and ends with status 1."""
    configure_logging(service=False)  # until the settings are read
    try:
        app()
    except RatchetError as error:
        _show(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    except Exception:
        if not writes_json():
            raise
        log.critical("unexpected error", exc_info=True)
        sys.exit(1)


def _show(error: RatchetError) -> None:
    if writes_json():
        log.error("%s", error)
        return
    console = Console(stderr=True, soft_wrap=True)
    console.print("[bold red]error:[/bold red] ", end="")
    console.print(error.message, markup=False, highlight=False)
    if error.fix:
        console.print("[bold]fix:[/bold]   ", end="")
        console.print(error.fix, markup=False, highlight=False)


if __name__ == "__main__":
    main()
