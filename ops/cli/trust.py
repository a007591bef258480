"""``ratchet trust``: samples that are held, and sources that are not trusted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from core.errors import ConfigError, RecordError, UnknownRecord
from core.progress import track
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, Reason, printable, sample_words, show_json, show_rows, write_images

if TYPE_CHECKING:
    from streams.store.sample_store import SampleStore

app = typer.Typer(help="Accept samples that are held; leave sources out of learning.", no_args_is_help=True)
LIMIT: Final = 1000
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Its whole name.")]
OfSource = Annotated[str | None, typer.Option("--source", help="Only of this source; empty: of none.")]
HeldFor = Annotated[
    str | None, typer.Option("--held-for", help="Only those held for held_source, held_quota or held_agreement.")
]


@app.command("list")
def list_sources(context: typer.Context, as_json: AsJson = False) -> None:
    """Distrusted sources, and numbers of held samples by source and reason. Times are in UTC.

    Example:  ratchet trust list
    """
    from ops.held_samples import held_counts

    distrusted = [
        {name: getattr(row, name) for name in ("source", "actor", "reason", "update_id", "created_at")}
        for row in ctx.ledger_of(context).distrusted()
    ]
    held = held_counts(ctx.store_of(context))
    if as_json:
        show_json({"distrusted": distrusted, "held": held})
        return
    show_rows(distrusted, "Distrusted sources")
    show_rows(({**row, "source": row["source"] or "(none)"} for row in held), "Held samples")


@app.command()
def samples(
    context: typer.Context,
    source: OfSource = None,
    held_for: HeldFor = None,
    limit: Annotated[int, typer.Option(min=1, max=LIMIT, help="Most samples.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Also write the images to this folder, named by their IDs.", file_okay=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The newest held samples, and why each is held.

    Examples:  ratchet trust samples --source crawler-7    |    ratchet trust samples --held-for held_quota --out held/
    """
    from ops.held_samples import held_samples

    store = ctx.store_of(context)
    rows = held_samples(store, limit, source, held_for)
    if out is not None:
        from streams.store.sample_queries import with_images

        write_images(out, ((row["id"][:12], row["image"]) for row in with_images(store, rows)))
    shown = (
        {"sample": row["id"][:12], "source": row["source"], "domain": row["domain"],
         "words": sample_words(row), "reason": row["reason"],
         "detail": row["detail"]}
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Held samples", as_json, data=rows, whole=["sample"])


@app.command()
def accept(
    context: typer.Context,
    reason: Reason,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="First 8 digits of each, or more.")] = None,
    source: OfSource = None,
    held_for: HeldFor = None,
) -> None:
    """Let held samples be learned from and judged with: some by ID, or those of a source, 10,000 in one call.

    Examples:  ratchet trust accept 0123456789ab --reason "looked at it"    |
    ratchet trust accept --source crawler-7 --held-for held_quota --reason "a planned delivery"
    """
    from ops import held_samples as held

    if bool(ids) == (source is not None) or (ids and held_for is not None):
        raise typer.BadParameter("give IDs, or --source, which --held-for can narrow")
    ledger, store = ctx.ledger_of(context), ctx.store_of(context)
    where = held.held_condition(source, held_for)
    if ids:
        chosen = list(dict.fromkeys(_held_id(store, each) for each in ids))
    else:
        chosen = [row["id"] for row in store.select(where, ["id"], held.MOST)]
    if not chosen:
        typer.echo("no sample is held that matches; `ratchet trust list` counts them")
        return
    follow = partial(track, label="accepting", total=len(chosen))
    accepted = held.accept_held(
        store, ledger, chosen, actor=ctx.person(), reason=reason, source=source, held_for=held_for, follow=follow
    )
    typer.echo(f"{accepted:,} sample{' is' if accepted == 1 else 's are'} accepted")
    if not ids and (left := store.count_rows(where)):
        typer.echo(f"{left:,} more are held; run this again to accept them")


@app.command()
def distrust(context: typer.Context, source: Source, reason: Reason) -> None:
    """Leave a source out of updates and suites, with all that it has sent and will send. Its samples stay stored.

    Example:  ratchet trust distrust crawler-7 --reason "captions are swapped"
    """
    from streams.store.conditions import quoted

    if not source.strip() or len(source) > 256:
        raise ConfigError("SOURCE: give the name of one source.", "`ratchet samples stats` counts samples by source.")
    actor, known = ctx.person(), ctx.ledger_of(context)
    if (row := next((each for each in known.distrusted() if each.source == source), None)) is not None:
        typer.echo(printable(f"{source!r} is already distrusted, by {row.actor}: {row.reason}"))
        return
    known.distrust(source, actor=actor, reason=reason)
    count = ctx.store_of(context).count_rows(f"kind = 'sample' AND source = {quoted(source)}")
    left_out = f"{count:,} stored samples are left out" if count else "no stored sample is of it so far"
    typer.echo(f"{source!r} is distrusted: {left_out}")


@app.command()
def trust(context: typer.Context, source: Source, reason: Reason) -> None:
    """Use a distrusted source again, also what it sent meanwhile.

    Example:  ratchet trust trust crawler-7 --reason "captions are repaired"
    """
    ctx.ledger_of(context).trust(source, actor=ctx.person(), reason=reason)
    typer.echo(f"{source!r} is learned from again")


def _held_id(store: SampleStore, beginning: str) -> str:
    from ops.held_samples import held_condition
    from streams.store.sample_queries import id_condition

    rows = store.select(f"{held_condition()} AND {id_condition(beginning)}", ["id"], 2)
    if not rows:
        raise UnknownRecord(f"no held sample has the id {beginning}.", "See `ratchet trust samples`.")
    if len(rows) > 1:
        raise RecordError("id", f"{beginning} is the beginning of several ids.", "Give more digits.")
    return str(rows[0]["id"])
