"""``ratchet samples``: stored samples, their deletion, and traces of records."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from core.errors import ConfigError, LedgerError, RecordError, UnknownRecord
from core.progress import meter, progress_log, track
from ops.cli import context as ctx
from ops.cli.terminal import (
    SINCE_HELP,
    AsJson,
    Reason,
    facts_text,
    parse_since,
    sample_words,
    show_facts,
    show_json,
    show_rows,
)

if TYPE_CHECKING:
    from core.ledger import DeletionRow, Ledger
    from core.settings.streams import Ingest
    from streams.store.sample_store import SampleStore

app = typer.Typer(help="Look at samples, export or delete them; trace a record.", no_args_is_help=True)
TOP: Final = 15
MAX_CARDS: Final = 500
"""Samples per page: about 5 MB of thumbnails."""
SIDE: Final = 192
POLL_SECONDS: Final = 1.0
DELETION_STATES: Final = {
    "requested": "waits for maintenance",
    "removed": "no reader finds it; waits until no file has it",
    "held": "no file of the store has it; the bucket keeps old versions of such files",
    "done": "no file has it",
}
MAX_REASON: Final = 1000
MAX_VALUE_CHARS: Final = 2000


InSplit = Annotated[
    Literal["train", "fresh_eval", "held_train", "held_fresh_eval"] | None,
    typer.Option("--split", help="Only samples of this split."),
]
InDomain = Annotated[str | None, typer.Option("--domain", help="Only samples of this domain.")]
OfSource = Annotated[str | None, typer.Option("--source", help="Only samples from this source.")]
OfConcept = Annotated[str | None, typer.Option("--concept", help="Only samples of this concept.")]
WithText = Annotated[str | None, typer.Option("--text", help="Only samples whose words contain this.")]
Since = Annotated[str | None, typer.Option("--since", help=SINCE_HELP)]
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
    """Trace a record: stored, held and why, a duplicate of what, refused and why, deleted, lost, or not read yet.

    Examples:  ratchet samples trace ratchet.samples:0:42    |    ratchet samples trace --id 0123456789ab
    """
    from streams.store.rows import read_position
    from streams.store.sample_queries import trace as receipts_of

    if (record is None) == (sample_id is None):
        raise typer.BadParameter("give a position, or --id")
    query = sample_id if record is None else read_position(record)
    receipts = receipts_of(ctx.store_of(context), query or "")
    if not receipts:
        raise UnknownRecord(f"no record has the id {sample_id}.", "Refused records have none: trace their position.")
    rows = []
    for each in receipts:
        facts = {"reason": each.reason, "detail": each.detail, "duplicate of": each.duplicate_of[:12],
                 "split": each.split, "source": each.source}  # fmt: skip
        details = "\n".join(f"{name}: {value}" for name, value in facts.items() if value)
        rows.append({"record": each.position, "outcome": each.outcome, "sample": each.id[:12], "when": each.time,
                     "details": details})  # fmt: skip
    show_rows(rows, "Records", as_json, data=[receipt.as_json() for receipt in receipts])


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
    """Samples, those stored last first. Times are in UTC.

    Examples:  ratchet samples list --domain streets --text bus    |    ratchet samples list --since 1h --html new.html
    """
    from streams.store.sample_queries import SampleFilter, newest_samples, with_images

    store, which = ctx.store_of(context), SampleFilter(split, domain, source, concept, text, parse_since(since))
    rows = newest_samples(store, which, limit if html is None else min(limit, MAX_CARDS))
    if html is not None:
        count = _write_page(html, "Samples", with_images(store, rows), ctx.of(context).settings.ingest)
        typer.echo(f"{count} samples in {html}")
        return
    names = ("split", "domain", "source", "concept")
    shown = (
        {
            "sample": row["id"][:12], "stored": row["ingested_at"], **{name: row[name] for name in names},
            "words": sample_words(row),
        }
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Samples", as_json, data=rows)


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
    settings = ctx.installed(context)
    row = _one(ctx.store_of(context), sample_id)
    if image is not None:
        _write(image, row["image"])
    if html is not None:
        _write_page(html, f"Sample {row['id'][:12]}", [row], settings.ingest)
    place = f"{settings.console.url}/samples/{row['id']}.png"
    show_facts({**_facts(row), "bytes": str(len(row["image"])), "thumbnail": place}, as_json=as_json)


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
    """Count samples by split, domain, source and concept; duplicates, losses, and refusals by source.

    Examples:  ratchet samples stats --json    |    ratchet samples stats --near-duplicates 0
    """
    from streams.ingest.duplicates import near_duplicates
    from streams.store.rows import SPLITS
    from streams.store.sample_queries import store_stats

    store = ctx.store_of(context)
    stats = store_stats(store)
    groups = {f"samples by {name}": values.top(TOP) for name, values in stats.samples.items()}
    groups |= {f"refused records by {name}": values.top(TOP) for name, values in stats.refusals.items()}
    kinds = ("sample", *SPLITS, "duplicate", "quarantine", "tombstone", "deleted", "gap_offsets")
    counts = {name: stats.tally[name] for name in kinds}
    counts |= {"bytes": stats.tally["bytes"], "bytes on disk": stats.size}
    if distance is not None:
        similar = near_duplicates(store, distance)
        counts["near duplicates"] = similar["domain"].counts.total() + similar["domain"].omitted
        groups |= {f"near duplicates by {name}": values.top(TOP) for name, values in similar.items()}
    if as_json:
        show_json({"version": stats.version, **counts, **{name: dict(rows) for name, rows in groups.items()}})
        return
    show_facts(counts, f"Sample store, version {stats.version}")
    show_counts(groups)


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
    from streams.store.sample_queries import SampleFilter, count_samples

    store, which = ctx.store_of(context), SampleFilter(split, domain, source, concept, text, parse_since(since))
    version = store.version()
    total = count_samples(store, which, version)
    count = write(store, path, which, version=version, follow=lambda rows: track(rows, "exporting", total))
    typer.echo(f"{count} samples in {path}")


@app.command()
def delete(
    context: typer.Context,
    reason: Reason,
    sample_id: Annotated[str | None, typer.Option("--id", help="The sample with this id.")] = None,
    source: Annotated[str | None, typer.Option(help="Samples and refused records of this source.")] = None,
    domain: Annotated[str | None, typer.Option(help="Samples of this domain.")] = None,
    concept: Annotated[str | None, typer.Option(help="Samples of this concept.")] = None,
    label: Annotated[str | None, typer.Option(help="Samples with this label.")] = None,
    key: Annotated[str | None, typer.Option(help="What came with this record key: text, or hex after 0x.")] = None,
    record: Annotated[str | None, typer.Option(help="What came of this record: TOPIC:PARTITION:OFFSET.")] = None,
    before: Annotated[
        str | None, typer.Option(help=f"Only what was ingested before this time: {SINCE_HELP.partition(': ')[2]}")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much it is, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when no file of the store has it any more.")] = False,
) -> None:
    """Delete samples and refused records: all that is named has to hold. What comes in later is not affected.

    Examples:  ratchet samples delete --source crawler-7 --dry-run --reason "consent withdrawn"    |
    ratchet samples delete --key user-17 --before 30d --reason "account closed" --yes --wait
    """
    from core.ledger import Ledger
    from streams.store.deletion import count_selected, request_deletion

    if not 0 < len(reason.strip()) <= MAX_REASON:
        raise typer.BadParameter(f"--reason has 1 to {MAX_REASON} characters")
    settings = ctx.installed(context)
    moment = parse_since(before)
    if key is not None:
        key = key[2:].lower() if key.startswith("0x") else key.encode().hex()
    options: dict[str, str | None] = {
        "id": sample_id, "source": source, "domain": domain, "concept": concept, "label": label, "key": key,
        "record": record, "before": None if moment is None else moment.isoformat(),
    }  # fmt: skip
    selector = {name: value for name, value in options.items() if value is not None}
    selected = count_selected(ctx.store_of(context), selector)
    typer.echo(f"{selected.samples:,} samples and {selected.refusals:,} refused records are selected.")
    if dry_run:
        return
    if not (selected.samples or selected.refusals):
        raise UnknownRecord("nothing is selected, so no deletion is requested.", "See `ratchet samples list --help`.")
    if not yes:
        typer.confirm("Delete them? This cannot be undone", abort=True)
    ledger = Ledger.open(settings.ledger)
    row = request_deletion(ledger, selector, actor=ctx.person(), reason=reason.strip())
    if wait:
        _show_receipt(_follow(ledger, row.id))
    else:
        typer.echo(f"{row.id} is requested. See `ratchet samples deletions {row.id}`.")


@app.command("deletions")
def list_deletions(
    context: typer.Context,
    deletion_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this one, with its receipt.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most deletions.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Deletions, newest first: how far they are, what they took out, and which adapters had learned from it.

    Examples:  ratchet samples deletions    |    ratchet samples deletions deletion-0123456789ab --json
    """
    from streams.store.deletion import as_json as receipt

    ledger = ctx.ledger_of(context)
    if deletion_id is not None:
        row = _deletion(ledger, deletion_id)
        show_json(receipt(row)) if as_json else _show_receipt(row)
        return
    rows = ledger.deletions(limit)
    shown = (
        {"deletion": row.id, "state": row.state, "selects": facts_text(row.selector), "samples": row.samples,
         "refusals": row.refusals, "requested": row.requested_at, "by": row.actor}
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Deletions", as_json, data=[receipt(row) for row in rows])


def show_counts(groups: Mapping[str, list[tuple[str, int]]]) -> None:
    for title, rows in groups.items():
        if rows:
            show_rows(({title: value or "(none)", "count": count} for value, count in rows), "")


def _deletion(ledger: Ledger, deletion_id: str) -> DeletionRow:
    row = ledger.deletion(deletion_id)
    if row is None:
        raise LedgerError(f"there is no deletion {deletion_id[:300]!r}.", "See `ratchet samples deletions`.")
    return row


def _follow(ledger: Ledger, deletion_id: str) -> DeletionRow:
    state, warned = "", False
    with meter(deletion_id) as progress:
        while (row := _deletion(ledger, deletion_id)).state not in ("held", "done"):
            if row.state != state:
                state = row.state
                progress_log.info(f"{row.id}: {DELETION_STATES[state]}")
            if not (warned or _is_maintained(ledger)):
                warned = True
                progress_log.info("nothing maintains the store now: start `ratchet maintain`")
            progress(lambda shown=DELETION_STATES[state]: shown)  # type: ignore[misc]
            time.sleep(POLL_SECONDS)
    return row


def _is_maintained(ledger: Ledger) -> bool:
    from streams.store.maintenance import LEASE

    return ledger.lease_is_held(LEASE)


def _show_receipt(row: DeletionRow) -> None:
    facts = {
        "deletion": row.id, "state": f"{row.state}: {DELETION_STATES[row.state]}", "selects": facts_text(row.selector),
        "samples": row.samples, "refused records": row.refusals,
        "adapters that learned from it": row.adapters.get("learned") or "none",
        "adapters that may have replayed it": row.adapters.get("may_have_replayed") or "none",
        "first update without it": row.update_id or "none yet",
        "requested": f"{row.requested_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} by {row.actor}", "reason": row.reason,
        "removed from the store": row.removed_at or "not yet",
        "gone from the store's files": row.held_at or row.done_at or "not yet", "what remains": row.remains,
        "what remains is locked until": row.remains_until, "gone from all files": row.done_at or "not yet",
    }  # fmt: skip
    show_facts({name: fact for name, fact in facts.items() if fact is not None})


def _one(store: SampleStore, sample_id: str) -> dict[str, Any]:
    from streams.store.sample_queries import find_samples

    rows = find_samples(store, sample_id)
    if not rows:
        raise UnknownRecord(f"no sample {sample_id} is stored.", f"See `ratchet samples trace --id {sample_id}`.")
    if len(rows) > 1:
        names = ", ".join(row["id"][:20] for row in rows)
        raise RecordError("id", f"{sample_id} is the beginning of several ids: {names}.", "Give more digits.")
    return rows[0]


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for name, value in sorted(row.items(), key=lambda item: item[0] != "id"):
        if name in ("image", "topic", "partition", "offset") or value in (None, "", []):
            continue
        shown = f"{value:%Y-%m-%d %H:%M:%S} UTC" if isinstance(value, datetime) else str(value)
        facts[name] = (", ".join(value) if isinstance(value, list) else shown)[:MAX_VALUE_CHARS]
    return {**facts, "record": f"{row['topic']}:{row['partition']}:{row['offset']}"}


def _write_page(path: Path, title: str, rows: Iterable[Mapping[str, Any]], limits: Ingest) -> int:
    """Write samples with thumbnails as one HTML file without scripts; returns their number. Raises ConfigError."""
    from jinja2 import Environment

    cards = [{"picture": _thumbnail(row["image"], limits), "facts": list(_facts(row).items())} for row in rows]
    template = resources.files("ops.cli").joinpath("templates/samples.html").read_text("utf-8")
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    page = Environment(autoescape=True).from_string(template).render(title=title, cards=cards, made=date)
    _write(path, page.encode(errors="replace"))
    return len(cards)


def _thumbnail(image: bytes, limits: Ingest) -> str | None:
    """An image as a small JPEG data URI; None if it does not decode."""
    from ratchet_client.images import decode_image

    try:
        picture = decode_image(image, limits.max_pixels, limits.max_image_bytes)
    except RecordError:
        return None
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", "Name another file.") from error
