"""``ratchet ledger``: the database itself, not what is in it."""

from __future__ import annotations

import typer
from sqlalchemy import make_url

from core.ledger import Ledger
from ops.cli import context as ctx

app = typer.Typer(help="The ledger's database.", no_args_is_help=True)


@app.command()
def migrate(context: typer.Context) -> None:
    """Make the ledger's tables, or bring them up to date. Running it again changes nothing.

    `ratchet serve` and `ratchet up` do it at their start. Where serving is started by others (KubeRay), this runs
    before each install and upgrade.

    Example:  RATCHET_LEDGER_URL=postgresql://ratchet@db/ratchet ratchet ledger migrate
    """
    url = ctx.of(context).settings.ledger
    Ledger.open(url).close()
    typer.echo(f"the ledger {make_url(url).render_as_string(hide_password=True)} is up to date")
