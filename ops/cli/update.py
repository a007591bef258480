"""``ratchet update``: the updater, and what an operator can do about an update."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from core.errors import ConfigError
from ops.cli import context as ctx

app = typer.Typer()
UpdateId = Annotated[str, typer.Argument(metavar="ID", help="Of the update, as `ratchet status` shows it.")]


@app.callback(invoke_without_command=True)
def update(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Train one update now, then end.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file; by default those of updater.")] = None,
    family: Annotated[
        Literal["clip", "vlm"] | None, typer.Option(help="Update only this model; a recipe decides by itself.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Use all data not learned yet, also if an update of it was rejected.")
    ] = False,
) -> None:
    """Train updates in the background when there is new data and budget, gate them, and propose what passes; or, with a
    command, look after one of them.

    Examples:  ratchet update    |    ratchet update --once --recipe vlm-naive --retry
    """
    if context.invoked_subcommand is not None:
        return
    from updater.service.process import be_nice, use_environment

    settings = ctx.of(context).settings
    be_nice(settings.updater.nice, settings.updater.idle)  # before imports that take seconds, and start threads
    use_environment()

    from updater.service.update_loop import run_update

    run_update(settings, once=once, recipe=recipe, family=family, retry=retry)


@app.command()
def abandon(
    context: typer.Context,
    update_id: UpdateId,
    reason: Annotated[str, typer.Option("--reason", "-r", prompt="Reason", help="Why; kept in the audit log.")],
) -> None:
    """End an update that waits or cannot end: it counts as failed, and nothing of it is released.

    An updater that trains it stops within seconds. What was charged for it stays charged. Its samples are not learned,
    and not lost: the next update learns from them, too. New samples begin that, or `ratchet update --once --retry`.

    Example:  ratchet update abandon update-0123456789ab --reason "a crawler sent broken pictures"
    """
    from core.ledger import Ledger

    settings = ctx.of(context).settings
    ledger = Ledger.open(settings.ledger)
    if ledger.base_upgrade(update_id) is not None:
        raise ConfigError(f"{update_id} is the upgrade of a base.", "See `ratchet base upgrade --help`.")
    row = ledger.abandon_update(update_id, actor=ctx.person(), reason=reason)
    typer.echo(f"{row.id} is {row.state}: {row.error}")


@app.command()
def retry(context: typer.Context, update_id: UpdateId) -> None:
    """Take an update up again that failed or was abandoned, or that has failed attempts: they count no more.

    It goes on where it is, and is not charged again. Refused where it was judged, or where a newer one of its model was
    begun: that has its samples.

    Example:  ratchet update retry update-0123456789ab
    """
    from core.ledger import Ledger

    row = Ledger.open(ctx.of(context).settings.ledger).retry_update(update_id, actor=ctx.person())
    typer.echo(f"{row.id} is {row.state}; the updater takes it up")
