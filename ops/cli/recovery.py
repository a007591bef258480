"""``ratchet backup`` and ``ratchet restore``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.filesize import decimal

from core.progress import say
from ops.cli import context as ctx

Url = Annotated[str, typer.Argument(help="A folder, or a URL such as s3://backups/ratchet/2026-11-28.", metavar="URL")]


def backup(context: typer.Context, url: Url) -> None:
    """Copy ledger, artifacts and lake while everything goes on; the last line is JSON.

    Each backup has a folder of its own. One that was interrupted is completed by the same command. What is not in it:
    settings, keys that are files, the bases in home (`ratchet base push` stores them among the artifacts), Kafka.

    Examples:  ratchet backup /backups/2026-11-28    |    ratchet backup s3://backups/ratchet/2026-11-28
    """
    from ops.recovery import back_up

    report = back_up(ctx.of(context).settings, url, ctx.person())
    say(f"backup: {report.files:,} files, {decimal(report.size)}, release {report.release}")
    typer.echo(json.dumps(asdict(report)))


def restore(context: typer.Context, url: Url) -> None:
    """Bring back a backup into an empty ledger, artifacts and lake, which the settings name; the last line is JSON.

    Start nothing before it has ended. One that was interrupted is completed by the same command.

    Example:  ratchet --set home=/srv/ratchet restore s3://backups/ratchet/2026-11-28
    """
    from ops.recovery import restore as run

    report = run(ctx.of(context).settings, url, ctx.person())
    say(f"restore: {report.files:,} files, {decimal(report.size)}; release {report.release} is live")
    typer.echo(json.dumps(asdict(report)))
