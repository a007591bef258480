"""``ratchet keys``: API keys, made and revoked in the ledger; a running server follows within two seconds."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from core.ledger import KeyRow, Ledger
from ops.cli import context as ctx

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


class Allowed(StrEnum):
    """What a key may do."""

    infer = "infer"
    search = "search"
    publish = "publish"
    operate = "operate"


Scopes = Annotated[
    list[Allowed],
    typer.Option("--scope", "-s", help="infer: ask the models; search: search the corpus, see its images and the "
                 "console; publish: send quarantined records again; operate: release, roll back, hold, resume. "
                 "Repeatable; none includes another."),
]  # fmt: skip


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who will use it: lower-case letters, digits and . _ @ -")],
    scope: Scopes,
    per_minute: Annotated[
        int | None,
        typer.Option(min=0, help="Most requests a minute, 0 for no limit; access.requests_per_minute if unset."),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; good until it is revoked if unset.")
    ] = None,
) -> None:
    """Make a key. The key itself is shown this once, alone on standard output; only its digest is kept.

    Examples:  ratchet keys create search-page --scope search --per-minute 600 --days 90    |
    export OPENAI_API_KEY=$(ratchet keys create ann --scope infer --scope operate)
    """  # fmt: skip
    ledger = Ledger.open(ctx.of(context).settings.ledger)
    row, token = ledger.create_key(
        name, [each.value for each in scope], actor=ctx.person(), requests_per_minute=per_minute, days=days
    )
    until = f" until {row.expires_at:%Y-%m-%d %H:%M} UTC" if row.expires_at else ""
    may = f"key {row.id} of {row.name} may {', '.join(row.scopes)}{until}"
    typer.echo(f"{may}; keep it, it is not shown again:", err=True)
    typer.echo(token)


@app.command("list")
def list_keys(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Revoked and expired keys too.")] = False,
) -> None:
    """Keys that are valid, newest first: what they may do, who made them, when they were last used.

    Examples:  ratchet keys list    |    ratchet keys list --all
    """
    settings = ctx.of(context).settings
    table = Table(
        Column("id", no_wrap=True), Column("name", no_wrap=True), "scopes", "per minute", "made by", "when (UTC)",
        "last used (UTC)", "expires (UTC)", title="Keys",
    )  # fmt: skip
    if everything:
        table.add_column("revoked (UTC)")
    for row in Ledger.open(settings.ledger).api_keys(ended=everything):
        limit = settings.access.requests_per_minute if row.requests_per_minute is None else row.requests_per_minute
        cells = [row.id, row.name, ", ".join(row.scopes), str(limit or "no limit"), row.actor, *_times(row)]
        table.add_row(*(Text(cell) for cell in (cells if everything else cells[:-1])))
    Console().print(table)


@app.command()
def revoke(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Its id or its name.")],
    reason: Annotated[str, typer.Option("--reason", "-r", prompt="Reason", help="Why; kept in the audit log.")],
) -> None:
    """End a key. Servers refuse it within two seconds; its name is not used again.

    Example:  ratchet keys revoke search-page --reason "was in a screenshot"
    """
    row = Ledger.open(ctx.of(context).settings.ledger).revoke_key(key, actor=ctx.person(), reason=reason)
    typer.echo(f"key {row.id} of {row.name} is revoked")


def _times(row: KeyRow) -> list[str]:
    times = (row.created_at, row.last_used_at, row.expires_at, row.revoked_at)
    return [f"{when:%Y-%m-%d %H:%M}" if when else "-" for when in times]
