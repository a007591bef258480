"""The ``ratchet`` command. The demo adds its commands by an entry point of the group ``ratchet.commands``: a function
of the :class:`typer.Typer` below. Benchmarks need a checkout."""

from __future__ import annotations

import errno
import gc
import importlib.util
import logging
import os
import sys
from copy import copy
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from core.errors import ConfigError, RatchetError
from core.log_format import writes_json
from core.logs import configure_logging
from core.stop_signals import Stopped, stop_on_signals
from ops.cli import (
    access,
    admin,
    bases,
    config,
    doctor,
    feedback,
    indexes,
    init,
    learning,
    metrics,
    parts,
    records,
    releases,
    samples,
    status,
    trust,
)
from ops.cli.context import Context, of

CHECKOUT = Path(__file__).parents[2]
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC)
OTHER_PATH = "Give a path that this user can write to; for all of Ratchet's own: --set home=DIR, or RATCHET_HOME."
YOUNG = 50_000
"""Threshold of garbage collection. Imports make many objects that stay: with Python's 700, a quarter of a command's
start went into visiting them again and again."""
WITH_MODELS = "Use the image cpu or gpu, not slim; without images install the extra `local`."

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


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ratchet {version('ratchet-server')}")
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings file; ratchet.yaml in this folder by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, e.g. --set serve.port=9000; repeatable.")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A model server that keeps learning and never slips back."""
    context.obj = Context(file, settings or [], context.invoked_subcommand or "ratchet")


def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="Benchmark, e.g. swap.")]) -> None:
    """Run a benchmark of a checkout: a table, then one line of JSON. Its flags follow its name; `-- --help` lists them.

    Examples:  ratchet bench swap    |    ratchet bench swap --swaps 40    |    ratchet bench swap -- --help
    """
    if not (CHECKOUT / "benchmarks" / "__init__.py").exists():
        raise ConfigError(
            "benchmarks are not part of an installation.", "Clone the repository, and run `make check` and this in it."
        )
    sys.path.insert(0, str(CHECKOUT))
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the processes that benchmarks start
    stop_on_signals()  # a benchmark stops what it started, as on Ctrl-C
    importlib.import_module("benchmarks").run(name, of(context).settings, context.args)


RUN, PARTS, DATA, OPERATE = "Run", "Parts", "Data and models", "Operate"
app.command(rich_help_panel=RUN)(init.init)
app.command(rich_help_panel=RUN)(parts.up)
app.command(rich_help_panel=PARTS)(parts.serve)
app.add_typer(parts.ingest_app, name="ingest", rich_help_panel=PARTS)
app.command(rich_help_panel=PARTS)(parts.maintain)
app.add_typer(parts.trainer_app, name="trainer", rich_help_panel=PARTS)
app.command(rich_help_panel=PARTS)(parts.console)
app.command(rich_help_panel=PARTS)(parts.broker)
app.command(rich_help_panel=DATA)(records.publish)
app.add_typer(samples.app, name="samples", rich_help_panel=DATA)
app.add_typer(records.app, name="quarantine", rich_help_panel=DATA)
app.add_typer(feedback.app, name="feedback", rich_help_panel=OPERATE)
app.add_typer(trust.app, name="trust", rich_help_panel=OPERATE)
app.add_typer(indexes.app, name="index", rich_help_panel=OPERATE)
app.add_typer(bases.app, name="base", rich_help_panel=DATA)
app.add_typer(learning.adapters, name="adapters", rich_help_panel=DATA)
app.add_typer(learning.recipes, name="recipes", rich_help_panel=DATA)
app.command(rich_help_panel=OPERATE)(status.status)
app.command(rich_help_panel=OPERATE)(doctor.doctor)
app.add_typer(releases.app, name="releases", rich_help_panel=OPERATE)
app.add_typer(learning.gate, name="gate", rich_help_panel=OPERATE)
app.add_typer(access.app, name="keys", rich_help_panel=OPERATE)
app.command(rich_help_panel=OPERATE)(access.audit)
app.add_typer(metrics.app, name="metrics", rich_help_panel=OPERATE)
app.add_typer(config.app, name="config", rich_help_panel=OPERATE)
app.add_typer(admin.app, name="admin", rich_help_panel=OPERATE)
app.command(rich_help_panel=OPERATE, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
for _point in distribution("ratchet-server").entry_points.select(group="ratchet.commands"):
    _point.load()(app)


def main() -> None:
    """Run the command line; known errors are shown without traceback and exit with status 1."""
    gc.set_threshold(YOUNG)
    configure_logging(service=False)  # until the settings are read
    try:
        _with_only(sys.argv[1:2])()
    except RatchetError as error:
        _show(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    except ModuleNotFoundError as error:
        if error.name is None or importlib.util.find_spec(error.name.partition(".")[0]) is not None:
            raise
        _show(RatchetError(f"this needs {error.name}, which is not installed here.", WITH_MODELS))
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
            _show(RatchetError(f"{error.filename} cannot be used: {error.strerror}.", OTHER_PATH))
            sys.exit(1)
        if not writes_json():
            raise
        log.critical("unexpected error", exc_info=True)
        sys.exit(1)
    finally:
        if "torch" not in sys.modules:  # whose libraries tell of objects that outlive them
            gc.freeze()  # or Python goes through all objects once more when it exits, for 0.1 s


def _with_only(first: list[str]) -> typer.Typer:
    """The application without the groups of commands that are not asked for: Typer takes 60 ms to build all of them."""
    asked = [group for group in app.registered_groups if [group.name] == first]
    if not asked:
        return app
    chosen = copy(app)
    chosen.registered_groups, chosen.registered_commands = asked, []
    return chosen


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
