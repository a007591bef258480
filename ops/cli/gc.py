"""``ratchet gc``: deletes adapters, carry-over, reports and caches that nothing needs any more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from core.artifacts import Artifacts
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import say
from core.settings import Settings
from ops.cli import context as ctx

if TYPE_CHECKING:
    from ops.collection import Collector, Item

SHOWN = 100
"""Rows of each table, unless all are wanted."""


def collect(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help=f"Show more than {SHOWN} rows of each table.")] = False,
) -> None:
    """Delete adapters, carry-over, gate reports and caches that nothing needs any more; the last line is JSON.

    What answers, what a rollback or a switch of the base goes back to, the best releases, what is not decided, and all
    that is young stays: see the settings under gc. `ratchet maintain` does the same every gc.hours.

    Examples:  ratchet gc --dry-run    |    ratchet --set gc.keep_days=30 gc
    """
    from ops.collection.plan import largest_first

    with _collector(ctx.of(context).settings) as collector:
        plan = collector.plan() if dry_run else collector.run(ctx.person())
    if plan is None:
        raise RatchetError("another collector, or a backup, is at work.", "Try again when it has ended.")
    _print("Would go" if dry_run else "Deleted", largest_first(plan.going), show_all)
    if dry_run:
        _print("Would stay", largest_first(item for item in plan.items if not item.goes), show_all)
    names = sorted(item.name for item in plan.going if item.kind == "adapter")
    typer.echo(json.dumps({"dry_run": dry_run, **plan.summary(), "adapters": names}))


def collect_garbage(settings: Settings) -> None:
    """One run for maintenance. While another collector or a backup is at work, nothing is done.

    Raises:
        LedgerError, ArtifactsUnavailable: see :meth:`ops.collection.Collector.run`.
    """
    with _collector(settings) as collector:
        plan = collector.run()
    if plan is not None and plan.items:
        counts = ", ".join(f"{count} of {kind}" for kind, count in plan.summary()["goes"].items())
        say(f"maintain: collected {decimal(plan.freed)}: {counts}")


@contextmanager
def _collector(settings: Settings) -> Iterator[Collector]:
    from ops.collection import Collector

    ledger = Ledger.open(settings.ledger)
    try:
        yield Collector(settings, ledger, Artifacts(settings.artifacts))
    finally:
        ledger.close()


def _print(title: str, items: list[Item], show_all: bool) -> None:
    shown = items if show_all else items[:SHOWN]
    table = Table("what", Column("name", overflow="fold"), Column("size", justify="right"), "why", title=title)
    for item in shown:
        table.add_row(item.kind, Text(item.name), decimal(item.bytes), Text(item.reason))
    Console().print(table)
    if len(items) > len(shown):
        typer.echo(f"and {len(items) - len(shown):,} more: --all shows them")
