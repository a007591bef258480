"""``ratchet base upgrade`` and ``ratchet base switch``: another CLIP base, with what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from core.errors import ConfigError
from core.ledger.learning import FINISHED
from ops.cli import context as ctx

if TYPE_CHECKING:
    from core.settings import Settings

_NAME = Annotated[str, typer.Argument(help="Name of a registered CLIP base (`ratchet base list`).")]


def upgrade(
    context: typer.Context,
    name: _NAME,
    budget: Annotated[
        float | None,
        typer.Option(
            help="MAF-GFLOPs that the replay may spend, beside the updates' budget; that of a day by default."
        ),
    ] = None,
    family: Annotated[str, typer.Option(help="Kind of model; only clip can be upgraded.")] = "clip",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and record nothing.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Drop the upgrade that is under way or waits.")] = False,
) -> None:
    """Learn everything that was learned anew on another base, and judge it against what is live.

    What passes is released by `ratchet base switch NAME`. A stopped upgrade goes on from its checkpoint; where an
    updater runs, that one does the work.

    Examples:  ratchet base upgrade b16 --dry-run    |    ratchet base upgrade b16 --budget 400000    |
    ratchet base upgrade b16 --cancel
    """
    from updater.service.base_upgrade import begin_upgrade, begun, cancel_upgrade, plan_upgrade

    settings = ctx.of(context).settings
    if family != "clip":
        raise ConfigError(f"--family {family}: only the base of a clip can be upgraded.", "Leave the option out.")
    if cancel:
        typer.echo(f"{cancel_upgrade(settings, name).id} is dropped")
        return
    update = begun(settings, name)
    if update is None or dry_run:
        plan = plan_upgrade(settings, name, budget)
        table = Table("what", "value", title=f"Upgrade to {name}", show_header=False)
        for row in plan.rows():
            table.add_row(*row)
        Console().print(table)
        if dry_run:
            return
        update = begin_upgrade(settings, plan, ctx.person())
    elif budget is not None:
        raise ConfigError(f"{update.id} has a budget already.", "Leave --budget out, or drop the upgrade: --cancel.")
    typer.echo(f"{update.id} is recorded ({update.state})")
    _finish(settings, name, update.id)


def switch(
    context: typer.Context,
    name: _NAME,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
) -> None:
    """Release the upgrade to a base that passed the gate; or go back to the base that was live before.

    Servers answer with the newest release of their own base: start them again with base.clip=NAME, one after the other.

    Examples:  ratchet base switch b16 --reason "better on all domains"    |
    ratchet base switch shipped --reason "searches are worse"
    """
    from updater.service.base_upgrade import switch_base

    settings = ctx.of(context).settings
    row = switch_base(settings, name, actor=ctx.person(), reason=reason)
    typer.echo(f"release {row.number} is in the ledger: clip {row.clip or 'base'} on the base {name}")
    typer.echo(f"now set base.clip to {name!r}, and start servers and updater again; until then the old base answers")


def _finish(settings: Settings, name: str, update_id: str) -> None:
    from updater.service.base_upgrade import finish_upgrade
    from updater.service.process import UpdaterBusy

    try:
        update, verdict = finish_upgrade(settings, update_id)
    except UpdaterBusy:
        typer.echo("the updater that runs here does it next: see `ratchet status`")
        return
    if update.state not in FINISHED:  # it was asked to stop
        return
    reasons = f": {'; '.join(map(str, verdict.summary.get('reasons', [])))}" if verdict else ""
    typer.echo(f"{verdict.outcome if verdict else update.state}{reasons}{f' ({update.error})' if update.error else ''}")
    if verdict is not None and verdict.outcome == "passed" and update.state == "done":
        typer.echo(f"release it with `ratchet base switch {name} --reason ...`")
    else:
        raise typer.Exit(1)
