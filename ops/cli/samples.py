"""``ratchet samples``: what is stored, and what became of a record."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table

from core.errors import ConfigError, RecordError, UnknownRecord
from core.progress import track
from ops.cli import context as ctx
from ops.cli import deletions
from ops.cli.cells import add_texts
from ops.cli.times import SINCE_HELP, parse_since

if TYPE_CHECKING:
    from streams.store.sample_queries import SampleFilter
    from streams.store.sample_store import SampleStore

app = typer.Typer(help="Look at samples, export or delete them; trace a record.", no_args_is_help=True)
TOP: Final = 15


class SplitName(StrEnum):
    """The parts that samples are in."""

    train = "train"
    fresh_eval = "fresh_eval"


InSplit = Annotated[SplitName | None, typer.Option("--split", help="Only samples of this split.")]
InDomain = Annotated[str | None, typer.Option("--domain", help="Only samples of this domain.")]
OfSource = Annotated[str | None, typer.Option("--source", help="Only samples from this source.")]
OfConcept = Annotated[str | None, typer.Option("--concept", help="Only samples of this concept.")]
WithText = Annotated[str | None, typer.Option("--text", help="Only samples whose words contain this.")]
Since = Annotated[str | None, typer.Option("--since", help=SINCE_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Page = Annotated[Path | None, typer.Option("--html", help="Write a page with thumbnails to this file.", dir_okay=False)]


@app.command()
def trace(
    context: typer.Context,
    record: Annotated[
        str | None, typer.Argument(metavar="TOPIC:PARTITION:OFFSET", help="The record's position.")
    ] = None,
    sample_id: Annotated[
        str | None, typer.Option("--id", help="Id of a sample, or its first 8 digits or more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What became of a record: stored, a duplicate of what, refused and why, deleted, lost, or not read yet.

    Examples:  ratchet samples trace ratchet.samples:0:42    |    ratchet samples trace --id 0123456789ab
    """
    from streams.store.sample_queries import RecordQuery
    from streams.store.sample_queries import trace as receipts_of

    if (record is None) == (sample_id is None):
        raise typer.BadParameter("give a position, or --id")
    query = sample_id if record is None else RecordQuery.parse(record)
    receipts = receipts_of(_store(context), query or "")
    if not receipts:
        raise UnknownRecord(f"no record has the id {sample_id}.", "Refused records have none: trace their position.")
    if as_json:
        typer.echo(json.dumps([receipt.as_json() for receipt in receipts], indent=2))
        return
    table = Table("record", "outcome", "sample", "when (UTC)", Column("details", overflow="fold"))
    for each in receipts:
        facts = {"reason": each.reason, "detail": each.detail, "duplicate of": each.duplicate_of[:12],
                 "split": each.split, "source": each.source}  # fmt: skip
        details = "\n".join(f"{name}: {value}" for name, value in facts.items() if value)
        when = f"{each.time:%Y-%m-%d %H:%M:%S}" if each.time else ""
        add_texts(table, each.position, each.outcome, each.id[:12], when, details)
    Console().print(table)


@app.command("list")
def list_samples(
    context: typer.Context,
    split: InSplit = None,
    domain: InDomain = None,
    source: OfSource = None,
    concept: OfConcept = None,
    text: WithText = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most samples.")] = 20,
    html: Page = None,
    as_json: AsJson = False,
) -> None:
    """Samples, those stored last first.

    Examples:  ratchet samples list --domain streets --text bus    |    ratchet samples list --since 1h --html new.html
    """
    from ops.cli.samples_page import MAX_CARDS, write_page
    from streams.store.sample_queries import newest_samples, with_images

    store, which = _store(context), _filter(split, domain, source, concept, text, since)
    rows = newest_samples(store, which, limit if html is None else min(limit, MAX_CARDS))
    if html is not None:
        count = write_page(html, "Samples", with_images(store, rows), ctx.of(context).settings.ingest)
        typer.echo(f"{count} samples in {html}")
        return
    if as_json:
        typer.echo(json.dumps(rows, default=str, indent=2))
        return
    table = Table("sample", "stored (UTC)", "split", "domain", "source", "concept", Column("words", overflow="fold"))
    for row in rows:
        words = row["text"] or f"{row['question']} -> {row['answer']}"
        when = f"{row['ingested_at']:%Y-%m-%d %H:%M}"
        add_texts(table, row["id"][:12], when, row["split"], row["domain"], row["source"], row["concept"], words[:200])
    Console().print(table)


@app.command()
def show(
    context: typer.Context,
    sample_id: Annotated[str, typer.Argument(metavar="ID", help="The sample's id, or its first 8 digits or more.")],
    image: Annotated[Path | None, typer.Option("--image", help="Write the image to this file.", dir_okay=False)] = None,
    html: Page = None,
    as_json: AsJson = False,
) -> None:
    """Everything that is stored of a sample.

    Example:  ratchet samples show 0123456789ab --image bus.jpg
    """
    from ops.cli.samples_page import facts, write_page

    settings = ctx.of(context).settings
    row = _one(_store(context), sample_id)
    if image is not None:
        _write(image, row["image"])
    if html is not None:
        write_page(html, f"Sample {row['id'][:12]}", [row], settings.ingest)
    console = settings.console
    values = {
        **dict(facts(row)),
        "bytes": str(len(row["image"])),
        "thumbnail": f"{console.url}/samples/{row['id']}.png",
    }
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    table = Table("field", Column("value", overflow="fold"), show_header=False)
    for name, value in values.items():
        add_texts(table, name, value)
    Console().print(table)


@app.command()
def stats(
    context: typer.Context,
    distance: Annotated[
        int | None,
        typer.Option(
            "--near-duplicates",
            min=0,
            max=16,
            help="Also count the samples that ingest.near_duplicate_distance would have dropped at this distance.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How many samples there are of each split, domain, source and concept; duplicates, losses, and refusals by source.

    Examples:  ratchet samples stats --json    |    ratchet samples stats --near-duplicates 0
    """
    from streams.ingest.duplicates import near_duplicates
    from streams.store.sample_queries import store_stats

    store = _store(context)
    stats = store_stats(store)
    groups = {f"samples by {name}": values.top(TOP) for name, values in stats.samples.items()}
    groups |= {f"refused records by {name}": values.top(TOP) for name, values in stats.refusals.items()}
    kinds = ("sample", "train", "fresh_eval", "duplicate", "quarantine", "tombstone", "deleted", "gap_offsets")
    counts = {name: stats.tally[name] for name in kinds}
    counts |= {"bytes": stats.tally["bytes"], "bytes on disk": stats.size}
    if distance is not None:
        similar = near_duplicates(store, distance)
        counts["near duplicates"] = similar["domain"].counts.total() + similar["domain"].omitted
        groups |= {f"near duplicates by {name}": values.top(TOP) for name, values in similar.items()}
    if as_json:
        values = {name: dict(rows) for name, rows in groups.items()}
        typer.echo(json.dumps({"version": stats.version, **counts, **values}, indent=2))
        return
    table = Table("", Column("count", justify="right"), title=f"Sample store, version {stats.version}")
    for name, count in counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    Console().print(table)
    for title, rows in groups.items():
        if rows:
            _print_counts(title, rows)


@app.command()
def refused(
    context: typer.Context,
    reason: Annotated[str | None, typer.Option(help="Only records refused for this reason.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Only records of this source; empty: of none that is known.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most records.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Refused records, newest first, and how many each source has sent.

    Examples:  ratchet samples refused --source crawler-7    |    ratchet samples refused --reason image_undecodable
    """
    from ratchet_client.records import REASONS
    from streams.store.sample_queries import refusal_counts

    if reason is not None and reason not in REASONS:
        raise typer.BadParameter(f"--reason is one of {', '.join(sorted(REASONS))}")
    store = _store(context)
    rows = store.refusals(limit, reason, source)
    if as_json:
        typer.echo(json.dumps(rows, default=str, indent=2))
        return
    table = Table("record", "reason", "source", "when (UTC)", Column("details", overflow="fold"))
    for row in rows:
        position = f"{row['topic']}:{row['partition']}:{row['offset']}"
        add_texts(
            table, position, row["reason"], row["source"], f"{row['ingested_at']:%Y-%m-%d %H:%M:%S}", row["detail"]
        )
    Console().print(table)
    for name, values in refusal_counts(store, reason, source).items():
        _print_counts(f"refused records by {name}", values.top(TOP))


@app.command()
def export(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="NAME.parquet, NAME.tar (a WebDataset shard), or a folder.")],
    split: InSplit = None,
    domain: InDomain = None,
    source: OfSource = None,
    concept: OfConcept = None,
    text: WithText = None,
    since: Since = None,
) -> None:
    """Write samples as a data set, as `ratchet publish` and others read it.

    Examples:  ratchet samples export all.parquet    |    ratchet samples export streets/ --domain streets
    """
    from streams.publish.export import export as write
    from streams.store.sample_queries import count_samples

    store, which = _store(context), _filter(split, domain, source, concept, text, since)
    version = store.version()
    total = count_samples(store, which, version)
    count = write(store, path, which, version=version, follow=lambda rows: track(rows, "exporting", total))
    typer.echo(f"{count} samples in {path}")


def _store(context: typer.Context) -> SampleStore:
    from streams.store.sample_store import SampleStore

    return SampleStore(ctx.of(context).settings.lake)


def _filter(
    split: SplitName | None, domain: str | None, source: str | None, concept: str | None, text: str | None,
    since: str | None,
) -> SampleFilter:  # fmt: skip
    from streams.store.sample_queries import SampleFilter

    return SampleFilter(None if split is None else split.value, domain, source, concept, text, parse_since(since))


def _one(store: SampleStore, sample_id: str) -> dict[str, Any]:
    from streams.store.sample_queries import find_samples

    rows = find_samples(store, sample_id)
    if not rows:
        raise UnknownRecord(f"no sample {sample_id} is stored.", f"See `ratchet samples trace --id {sample_id}`.")
    if len(rows) > 1:
        names = ", ".join(row["id"][:20] for row in rows)
        raise RecordError("id", f"{sample_id} is the beginning of several ids: {names}.", "Give more digits.")
    return rows[0]


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from error


def _print_counts(title: str, rows: list[tuple[str, int]]) -> None:
    table = Table(Column(title, overflow="fold"), Column("count", justify="right"))
    for value, count in rows:
        add_texts(table, value or "(none)", f"{count:,}")
    Console().print(table)


app.command("delete")(deletions.delete)
app.command("deletions")(deletions.list_deletions)
