"""``ratchet publish`` and ``ratchet quarantine``: publish records, and list or resubmit quarantined ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.progress import meter
from ops.cli import context as ctx
from ops.cli.samples import TOP, show_counts
from ops.cli.terminal import SINCE_HELP, AsJson, Reason, parse_since, show_rows

app = typer.Typer(help="List refused records, and send them again.", no_args_is_help=True)

RefusedFor = Annotated[
    str | None, typer.Option("--refused-for", help="Only records refused for this reason, e.g. image_undecodable.")
]
FromSource = Annotated[
    str | None, typer.Option("--source", help="Only records of this source; empty: of none that is known.")
]


def publish(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(help="A folder, a file, or a pattern of shards in quotes: 'shards/{000..010}.tar'.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="folder, webdataset, parquet, csv, llava, jsonl, coco, vqa, sidecars or imagefolder; found by itself."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split, and those that name none.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows in this run.")] = None,
    source: Annotated[str | None, typer.Option(help="Recorded as the source of samples that name none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check every row, and send nothing.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out invalid rows; the first one ends it otherwise.")
    ] = False,
    rejects: Annotated[
        Path | None, typer.Option(help="Write what was refused, and why, to this file (JSON Lines).", dir_okay=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind what an earlier run of this data set delivered.")
    ] = False,
    wait: Annotated[
        float | None, typer.Option(min=1, help="Wait at most this many seconds until ingest has stored it.")
    ] = None,
) -> None:
    """Send the samples of a data set to the Kafka topic, and report what the broker acknowledged.

    Reads, as a stream: a folder with data.csv, CSV, JSON Lines, WebDataset, img2dataset, Hugging Face Parquet,
    imagefolder, COCO captions, VQAv2, LLaVA.

    Exit status: 0 every row was delivered; 1 it ended early (broker, settings, a bad row without --skip-bad);
    3 some rows were refused; 4 all of them were.

    Examples:  ratchet publish photos/    |    ratchet publish 'laion/{00000..00099}.tar' --skip-bad --rejects bad.jsonl

    ratchet publish coco/annotations/captions_train2017.json --dry-run    |    ratchet publish flickr30k/ --resume
    """
    from streams.publish.datasets import choose
    from streams.publish.publisher import publish as send

    settings = ctx.of(context).settings
    choose(path, format)  # a wrong path is told first
    if not dry_run:
        ctx.need_broker(settings)
    report = send(
        settings, path, format=format, split=split, limit=limit, source=source, dry_run=dry_run, skip_bad=skip_bad,
        resume=resume, rejects=rejects,
    )  # fmt: skip
    typer.echo(str(report))
    if wait is not None and report.last:
        from streams.publish.publisher import wait_until_stored

        wait_until_stored(settings, report.last, wait)
    raise typer.Exit(report.exit_status)


@app.command("list")
def list_quarantined(
    context: typer.Context,
    refused_for: RefusedFor = None,
    source: FromSource = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most records.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Refused records, newest first, and how many each source has sent. Times are in UTC.

    Examples:  ratchet quarantine list --source crawler-7    |
    ratchet quarantine list --refused-for image_undecodable
    """
    from ratchet_client.records import REASONS
    from streams.store.sample_queries import quarantine_counts

    if refused_for is not None and refused_for not in REASONS:
        raise typer.BadParameter(f"--refused-for is one of {', '.join(sorted(REASONS))}")
    store = ctx.store_of(context)
    rows = store.quarantined(limit, refused_for, source)
    shown = (
        {"record": f"{row['topic']}:{row['partition']}:{row['offset']}", "reason": row["reason"],
         "source": row["source"], "when": row["ingested_at"], "details": row["detail"]}
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Quarantine", as_json, data=rows)
    if not as_json:
        counts = quarantine_counts(store, refused_for, source)
        show_counts({f"refused records by {name}": values.top(TOP) for name, values in counts.items()})


@app.command()
def resubmit(
    context: typer.Context,
    reason: Reason,
    refused_for: RefusedFor = None,
    source: FromSource = None,
    since: Annotated[str | None, typer.Option(help=f"Refused {SINCE_HELP[0].lower()}{SINCE_HELP[1:]}")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Without any of these: all refused records.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most records, the oldest first.")] = 1000,
    per_second: Annotated[float, typer.Option(min=0.1, max=10_000, help="Most records a second.")] = 50.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and send nothing.")] = False,
) -> None:
    """Send refused records to the topic again as they came, each once, when what refused them is corrected.

    Exit status: 0 all were sent, or none was left to send; 1 it ended early (broker, store, ledger); 3 some were not.

    Examples:  ratchet quarantine resubmit --refused-for uri_unreachable --since 1d --reason "the image server is back"
    |    ratchet quarantine resubmit --source crawler-7 --dry-run --reason "raised ingest.max_pixels"
    """
    from streams.ingest.resubmit import QuarantineFilter, resubmit_many

    if (refused_for, source, since) == (None, None, None) and not everything:
        raise typer.BadParameter("name --refused-for, --source or --since, or say --all")
    which = QuarantineFilter(refused_for, source, parse_since(since), limit)
    settings, ledger = ctx.of(context).settings, ctx.ledger_of(context)
    if not dry_run:
        ctx.need_broker(settings)
    with meter("sending again") as progress:
        report = resubmit_many(
            settings, ledger, which, actor=ctx.person(), reason=reason,
            dry_run=dry_run, per_second=per_second,
            on_progress=lambda so_far: progress(lambda: f"{so_far.sent} of {so_far.chosen}"),
        )  # fmt: skip
    typer.echo(str(report))
    raise typer.Exit(report.exit_status)
