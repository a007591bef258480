"""``ratchet keys`` and ``ratchet audit``. Running servers follow changes of keys within two seconds."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ops.cli import context as ctx
from ops.cli.terminal import AsJson, Reason, show_rows

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

Allowed = StrEnum("Allowed", "infer search feedback publish operate")  # typer takes a list of an enum, not of a Literal
Scopes = Annotated[
    list[Allowed],
    typer.Option("--scope", "-s", help="infer: ask the models; search: search the corpus, see its images and the "
                 "console; feedback: report answers; publish: send quarantined records again; operate: release, roll "
                 "back, hold, resume. Repeatable; none includes another."),
]  # fmt: skip


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The user or program that gets it: lower-case letters, digits, . _ @ -")],
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
    row, token = ctx.ledger_of(context).create_key(
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
    as_json: AsJson = False,
) -> None:
    """Keys that are valid, newest first: what they may do, who made them, when they were last used. Times are in UTC.

    Examples:  ratchet keys list    |    ratchet keys list --all
    """
    default = ctx.of(context).settings.access.requests_per_minute
    rows = [
        {
            "id": row.id, "name": row.name, "scopes": row.scopes,
            "per_minute": (default if row.requests_per_minute is None else row.requests_per_minute) or "no limit",
            "made_by": row.actor, "made_at": row.created_at, "last_used": row.last_used_at,
            "expires": row.expires_at, "revoked": row.revoked_at,
        }
        for row in ctx.ledger_of(context).api_keys(ended=everything)
    ]  # fmt: skip
    show_rows(rows, "Keys", as_json, whole=["id", "name"])


@app.command()
def revoke(
    context: typer.Context, key: Annotated[str, typer.Argument(help="Its id or its name.")], reason: Reason
) -> None:
    """End a key. Servers refuse it within two seconds; its name is not used again.

    Example:  ratchet keys revoke search-page --reason "was in a screenshot"
    """
    row = ctx.ledger_of(context).revoke_key(key, actor=ctx.person(), reason=reason)
    typer.echo(f"key {row.id} of {row.name} is revoked")


def audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most rows.")] = 50,
    subject: Annotated[
        str | None, typer.Option(help="Only rows about it: 'release 12', 'key ann', or 'release' for all of them.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="Only what this one did; a key's actor reads key:NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every action of operators and of Ratchet itself, newest first. Times are in UTC.

    Examples:  ratchet audit --limit 10    |    ratchet audit --subject "release 12"    |
    ratchet audit --actor key:ann
    """
    rows = ctx.ledger_of(context).audit_rows(limit, subject, actor)
    shown = ({"when": row.created_at, "who": row.actor, "did": row.action, "to": row.subject, "details": row.detail}
             for row in rows)  # fmt: skip
    show_rows(shown, "Audit", as_json, data=rows)
