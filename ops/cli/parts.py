"""Commands that run a part until SIGTERM, and operators' commands on partitions and updates."""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from core.errors import ConfigError, RatchetError
from core.progress import progress_log, step
from core.stop_signals import Stopped, stop_on_signals
from ops.cli import context as ctx
from ops.cli.admin import collect_garbage
from ops.cli.terminal import Reason
from ratchet_client.models import Family

if TYPE_CHECKING:
    from core.settings import Settings

UpdateId = Annotated[str, typer.Argument(metavar="ID", help="Of the update, as `ratchet status` shows it.")]

ingest_app = typer.Typer()
trainer_app = typer.Typer()


def up(
    context: typer.Context,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave a part out: broker, serve, ingest, maintain, trainer, console.")
    ] = None,
) -> None:
    """Start everything on this machine and show its activity; Ctrl-C stops it in order.

    Examples:  ratchet up    |    ratchet up --without trainer    |    ratchet --set serve.port=9000 up
    """
    from rich.live import Live

    from ops.cli.status import screen
    from ops.cli.supervisor import Supervisor
    from ops.cli.tune import is_tuned

    shared = ctx.of(context)
    names = [name for name in Supervisor.ORDER if name not in (without or [])]
    stop_on_signals()
    try:
        make_ready(shared.settings)
        with Supervisor(shared, names) as parts:
            progress = None
            with step("starting " + ", ".join(part.name for part in parts.parts)):
                if "serve" in names:
                    progress = parts.wait_until_ready("clip")
            settings = shared.settings
            progress_log.info(f"serving on {settings.serve.url} (docs at /docs)")
            if not is_tuned(settings):
                progress_log.info(
                    "`ratchet doctor --tune` finds the fastest settings for this machine, in a minute or two"
                )
            if "console" in names:
                progress_log.info(f"console on {settings.console.url}")
            console = Console()
            if not console.is_terminal:
                while True:
                    parts.restart_dead()
                    if progress is not None and progress.look():
                        progress = None
                    time.sleep(1)
            with Live(console=console, auto_refresh=False, screen=True) as live:
                while True:
                    parts.restart_dead()
                    live.update(screen(settings, parts), refresh=True)
                    time.sleep(1)
    except Stopped:
        progress_log.info("stopped")


def make_ready(settings: Settings) -> None:
    """Make sure that the configured bases exist. Installed packages make theirs by entry points of the group
    ``ratchet.bases``: functions of the settings, named after the base, that also prepare the data of its gate and
    trainer. Raises RatchetError when another base is not registered."""
    from serving.engines.clip_base import list_bases

    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)  # an error before minutes of building bases
    provided = {point.name: point for point in entry_points(group="ratchet.bases")}
    bases: list[tuple[Family, str, str]] = [
        ("clip", settings.base.clip, "--model ..."), ("vlm", settings.base.vlm, "--family vlm --model ..."),
    ]  # fmt: skip
    for family, name, options in bases:
        if name in provided:
            provided[name].load()(settings)
        elif name and name not in list_bases(settings.home, family):
            raise RatchetError(f"base {name!r} is not registered.", f"Run `ratchet base add {name} {options}` first.")


def serve(context: typer.Context) -> None:
    """Serve over HTTP with Ray Serve, until SIGTERM.

    Example:  ratchet --set serve.encoder_replicas=4 serve
    """
    from serving.app import serve_app

    serve_app(ctx.of(context).settings)


def maintain(
    context: typer.Context, once: Annotated[bool, typer.Option("--once", help="Run once and exit.")] = False
) -> None:
    """Keep the sample store compact, delete what is to be deleted, collect garbage, and publish events, until SIGTERM.

    Of several processes one works, and the others wait to take over.

    Examples:  ratchet maintain    |    ratchet maintain --once
    """
    from streams.store.maintenance import run_maintain

    settings = ctx.of(context).settings
    run_maintain(settings, once=once, collect=partial(collect_garbage, settings))


def console(context: typer.Context) -> None:
    """Serve the console, a web page for operators and visitors, until SIGTERM.

    Example:  ratchet --set console.port=9001 console
    """
    from ops.console.app import run_console

    run_console(ctx.of(context).settings)


def broker(context: typer.Context) -> None:
    """Run the embedded Kafka-compatible broker (memory only: for one machine and for tests), until SIGTERM.

    Example:  ratchet --set kafka.bootstrap=127.0.0.1:9092 broker
    """
    from streams.kafka.broker import run_broker

    run_broker(ctx.of(context).settings)


@ingest_app.callback(invoke_without_command=True)
def ingest(
    context: typer.Context,
    topic: Annotated[
        str | None, typer.Option(help="One of kafka.topics, each bound to a source; by default kafka.topic.")
    ] = None,
) -> None:
    """Read the Kafka topic into the sample store, until SIGTERM; or, with a command, look after a partition.

    Examples:  ratchet --set kafka.bootstrap=kafka-1:9092 ingest    |    ratchet ingest --topic samples.cameras
    """
    if context.invoked_subcommand is not None:
        ctx.of(context).role = "ratchet"  # its commands are no services
        return
    from streams.ingest.consumer import run_ingest

    run_ingest(ctx.of(context).settings, topic)


@ingest_app.command()
def skip(
    context: typer.Context,
    partition: Annotated[str, typer.Argument(metavar="TOPIC:PARTITION", help="Which partition.")],
    to: Annotated[int, typer.Option("--to", min=1, help="The next offset to read; at most the end of the log.")],
    reason: Reason,
) -> None:
    """Go on with a partition at another offset. What lies before it is recorded as lost, and is not read any more.

    A running worker goes on there with its next commit. Refused: going backwards, or beyond the end of the log.

    Example:  ratchet ingest skip ratchet.samples:0 --to 4711 --reason "a burst of test records"
    """
    from streams.ingest.resubmit import skip as skip_offsets

    settings = ctx.of(context).settings
    skipped = skip_offsets(settings, ctx.ledger_of(context), partition, to, actor=ctx.person(), reason=reason)
    count = skipped.until - skipped.start
    typer.echo(f"{skipped.stream}:{skipped.partition} goes on at {skipped.until}; {count} offsets are skipped")


@trainer_app.callback(invoke_without_command=True)
def trainer(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Train one update now and exit.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file; by default those of updater.")] = None,
    family: Annotated[Family | None, typer.Option(help="Update only this model; a recipe decides by itself.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Use all data not learned yet, also if an update of it was rejected.")
    ] = False,
) -> None:
    """Train updates in the background when there is new data and budget, gate them, and propose what passes; or, with a
    command, look after one of them.

    Examples:  ratchet trainer    |    ratchet trainer --once --recipe vlm-naive --retry
    """
    if context.invoked_subcommand is not None:
        ctx.of(context).role = "ratchet"  # its commands are no services
        return
    from updater.service.process import be_nice, use_environment

    settings = ctx.of(context).settings
    be_nice()  # before imports that take seconds and start threads
    use_environment()

    from updater.service.update_loop import run_update

    run_update(settings, once=once, recipe=recipe, family=family, retry=retry)


@trainer_app.command()
def abandon(context: typer.Context, update_id: UpdateId, reason: Reason) -> None:
    """End an update that waits or cannot end: it counts as failed, and nothing of it is released.

    A trainer that works on it stops within seconds. What was charged for it stays charged. Its samples are not learned,
    and not lost: the next update learns from them, too. New samples begin that, or `ratchet trainer --once --retry`.

    Example:  ratchet trainer abandon update-0123456789ab --reason "a crawler sent broken pictures"
    """
    ledger = ctx.ledger_of(context)
    if ledger.base_upgrade(update_id) is not None:
        raise ConfigError(f"{update_id} is the upgrade of a base.", "See `ratchet base upgrade --help`.")
    row = ledger.abandon_update(update_id, actor=ctx.person(), reason=reason)
    typer.echo(f"{row.id} is {row.state}: {row.error}")


@trainer_app.command()
def retry(context: typer.Context, update_id: UpdateId) -> None:
    """Take an update up again that failed or was abandoned, or that has failed attempts: they count no more.

    It goes on where it is, and is not charged again. Refused where it was judged, or where a newer one of its model was
    begun: that has its samples.

    Example:  ratchet trainer retry update-0123456789ab
    """
    row = ctx.ledger_of(context).retry_update(update_id, actor=ctx.person())
    typer.echo(f"{row.id} is {row.state}; the trainer takes it up")
