"""``ratchet index``: tables and collections of yours whose vectors follow releases."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import asdict
from typing import Annotated

import typer

from core.errors import ConfigError
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, show_rows

app = typer.Typer(help="Keep vectors in your pgvector table or Qdrant collection up to date.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the index, and of the view or alias that you search.")]


@app.command()
def add(
    context: typer.Context,
    name: Name,
    to: Annotated[str, typer.Option(help="postgresql://USER@HOST/DATABASE, qdrant://HOST:PORT or qdrant:///FOLDER.")],
    table: Annotated[str, typer.Option(help="Your table or collection.")],
    image: Annotated[str, typer.Option(help="Its field with an image: a URI that ingest may fetch, or bytes.")],
    id: Annotated[str, typer.Option("--id", help="Its field with a unique ID.")] = "id",
) -> None:
    """Register a table or collection, which `ratchet index run` then fills. Passwords come from the environment:
    PGPASSFILE or PGPASSWORD, RATCHET_QDRANT_API_KEY.

    Example:  ratchet index add found --to postgresql://app@db/shop --table photos --id id --image url
    """
    from core.ledger.rows import IndexRow
    from serving.indexes.store import open_store

    if not re.fullmatch("[a-z][a-z0-9_]{0,39}", name):
        raise ConfigError(f"{name!r} is not a name for an index.", "Use lower-case letters, digits and underscores.")
    row, ledger = IndexRow(name=name, url=to, source=table, id_field=id, image_field=image), ctx.ledger_of(context)
    open_store(row).close()
    ledger.add_index(row, actor=ctx.person())
    typer.echo(f"index {name} is registered; `ratchet index run` fills it")


@app.command("list")
def list_indexes(context: typer.Context, as_json: AsJson = False) -> None:
    """All indexes, and each image space in them: its state, rows, and recall@10. Times are in UTC.

    Example:  ratchet index list
    """
    _show(context, None, as_json)


@app.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """One index, and each image space in it.

    Example:  ratchet index show found --json
    """
    _show(context, name, as_json)


@app.command()
def pause(context: typer.Context, name: Name) -> None:
    """Leave an index as it is. Releases do not wait for it.

    Example:  ratchet index pause found
    """
    ctx.ledger_of(context).pause_index(name, True, actor=ctx.person())


@app.command()
def resume(context: typer.Context, name: Name) -> None:
    """Go on with a paused index.

    Example:  ratchet index resume found
    """
    ctx.ledger_of(context).pause_index(name, False, actor=ctx.person())


@app.command()
def remove(
    context: typer.Context,
    name: Name,
    keep: Annotated[bool, typer.Option("--keep", help="Leave in the database what Ratchet added to it.")] = False,
) -> None:
    """Forget an index, and remove its vectors, and the view or alias, from the database.

    Example:  ratchet index remove found
    """
    from serving.indexes.store import open_store

    ledger = ctx.ledger_of(context)
    row, spaces = ledger.index(name), ledger.index_spaces(name)
    store = None if keep else open_store(row)
    ledger.remove_index(name, actor=ctx.person())
    if store is not None:
        for space in spaces:
            store.drop(space.space)
        store.close()


@app.command()
def run(
    context: typer.Context,
    rows_per_second: Annotated[float, typer.Option(min=0, help="Most rows embedded per second; 0: no limit.")] = 0.0,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus port, for probes; 0: off.")] = 0,
) -> None:
    """Embed new and changed rows, and follow releases and rollbacks, until SIGTERM.

    Of several processes one works, and the others wait to take over.

    Examples:  ratchet index run    |    ratchet index run --rows-per-second 50
    """
    from core import metrics
    from core.priority import SPIN_COUNT
    from core.stop_signals import Stopped, stop_on_signals

    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # an encoder may serve on the same cores
    from serving.indexes.worker import run_indexes

    stop_on_signals()
    settings, stopping = ctx.of(context).settings, threading.Event()
    metrics.build.started("index")
    metrics.listen("index", metrics_port, settings.metrics_host)
    try:
        run_indexes(settings, ctx.ledger_of(context), stopping, rows_per_second)
    except Stopped:
        typer.echo("stopped")


def _show(context: typer.Context, name: str | None, as_json: bool) -> None:
    ledger = ctx.ledger_of(context)
    rows, spaces = [ledger.index(name)] if name else ledger.indexes(), ledger.index_spaces(name)
    data = [{**asdict(row), "spaces": [asdict(each) for each in spaces if each.name == row.name]} for row in rows]
    shown = [
        {"index": row["name"], "to": row["url"], "source": row["source"],
         "state": "paused" if row["paused"] else row["problem"] or "ok"} for row in data
    ]  # fmt: skip
    show_rows(shown, "Indexes", as_json, data=data)
    if not as_json:
        show_rows([asdict(each) for each in spaces], "Image spaces", whole=["space", "state"])
