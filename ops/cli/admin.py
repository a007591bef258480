"""``ratchet admin``: backup and restore, garbage collection, migration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from core.errors import RatchetError
from core.progress import progress_log
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, show_rows

if TYPE_CHECKING:
    from core.settings import Settings
    from ops.collection import Collector, Item

SHOWN = 100
"""Rows per table of `gc`, without --all."""

app = typer.Typer(help="Back up and restore, collect garbage, migrate the ledger.", no_args_is_help=True)

Url = Annotated[str, typer.Argument(help="A folder, or a URL such as s3://backups/ratchet/2026-11-28.", metavar="URL")]


@app.command()
def backup(context: typer.Context, url: Url) -> None:
    """Copy ledger, artifacts and lake while everything goes on; the last line is JSON.

    Each backup has a folder of its own. One that was interrupted is completed by the same command. What is not in it:
    settings, keys that are files, the bases in home (`ratchet base push` stores them among the artifacts), Kafka.

    Examples:  ratchet admin backup /backups/2026-11-28    |    ratchet admin backup s3://backups/ratchet/2026-11-28
    """
    settings = ctx.installed(context)
    from ops.recovery import back_up

    report = back_up(settings, url, ctx.person())
    progress_log.info(f"backup: {report.files:,} files, {decimal(report.size)}, release {report.release}")
    typer.echo(json.dumps(asdict(report)))


@app.command()
def restore(context: typer.Context, url: Url) -> None:
    """Bring back a backup into an empty ledger, artifacts and lake, which the settings name; the last line is JSON.

    Start nothing before it has ended. One that was interrupted is completed by the same command.

    Example:  ratchet --set home=/srv/ratchet admin restore s3://backups/ratchet/2026-11-28
    """
    from ops.recovery import restore as run

    report = run(ctx.of(context).settings, url, ctx.person())
    progress_log.info(f"restore: {report.files:,} files, {decimal(report.size)}; release {report.release} is live")
    typer.echo(json.dumps(asdict(report)))


@app.command("gc")
def collect(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go and what would stay.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help=f"Show more than {SHOWN} rows of each table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete adapters, carry-over, gate reports and caches that nothing needs any more; the last line is JSON.

    What answers, what a rollback or a switch of the base goes back to, the best releases, what is not decided, and all
    that is young stays: see the settings under gc. `ratchet maintain` does the same every gc.hours.

    Examples:  ratchet admin gc --dry-run    |    ratchet --set gc.keep_days=30 admin gc
    """
    settings = ctx.installed(context)
    from ops.collection import largest_first

    with _collector(settings) as collector:
        plan = collector.plan() if dry_run else collector.run(ctx.person())
    if plan is None:
        raise RatchetError("another collector, or a backup, is at work.", "Try again when it has ended.")
    if not as_json:
        most = None if show_all else SHOWN
        _show_items("Would go" if dry_run else "Deleted", largest_first(plan.going), most)
        if dry_run:
            _show_items("Would stay", largest_first(item for item in plan.items if not item.goes), most)
    names = sorted(item.name for item in plan.going if item.kind == "adapter")
    typer.echo(json.dumps({"dry_run": dry_run, **plan.summary(), "adapters": names}))


def collect_garbage(settings: Settings) -> None:
    """Collect garbage once for maintenance, unless a collector or backup is running. Raises as its ``run``."""
    with _collector(settings) as collector:
        plan = collector.run()
    if plan is not None and plan.items:
        counts = ", ".join(f"{count} of {kind}" for kind, count in plan.summary()["goes"].items())
        progress_log.info(f"maintain: collected {decimal(plan.freed)}: {counts}")


@contextmanager
def _collector(settings: Settings) -> Iterator[Collector]:
    from core.artifacts import Artifacts
    from core.ledger import Ledger
    from ops.collection import Collector

    with closing(Ledger.open(settings.ledger)) as ledger:
        yield Collector(settings, ledger, Artifacts(settings.artifacts))


def _show_items(title: str, items: list[Item], most: int | None) -> None:
    shown = ({"what": item.kind, "name": item.name, "size": decimal(item.bytes), "why": item.reason}
             for item in items[:most])  # fmt: skip
    show_rows(shown, title)
    if most is not None and len(items) > most:
        typer.echo(f"and {len(items) - most:,} more: --all shows them")


@app.command()
def migrate(context: typer.Context) -> None:
    """Make the ledger's tables, or bring them up to date. Running it again changes nothing.

    `ratchet serve` and `ratchet up` do it at their start. Where serving is started by others (KubeRay), this runs
    before each install and upgrade.

    Example:  RATCHET_LEDGER_URL=postgresql://ratchet@db/ratchet ratchet admin migrate
    """
    from sqlalchemy import make_url

    from core.ledger import Ledger

    url = ctx.of(context).settings.ledger
    Ledger.open(url).close()
    typer.echo(f"the ledger {make_url(url).render_as_string(hide_password=True)} is up to date")
