"""``ratchet publish`` and ``ratchet data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ops.cli import context as ctx

app = typer.Typer(help="Free image-text data that package registries ship.", no_args_is_help=True)


def publish(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(help="A folder, a file, or a pattern of shards in quotes: 'shards/{000..010}.tar'.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="folder, webdataset, parquet, csv, llava, jsonl, coco, sidecars or imagefolder; found by itself."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only rows of this split, and those that name none.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows in this run.")] = None,
    source: Annotated[str | None, typer.Option(help="Recorded as the source of samples that name none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check every row, and send nothing.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that are no valid samples; the first ends it otherwise.")
    ] = False,
    rejects: Annotated[
        Path | None, typer.Option(help="Write what was refused, and why, to this file (JSON Lines).", dir_okay=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind what an earlier run of this data set delivered.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds in which ingest has to store it; without it nothing is waited for."),
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
    from streams.publish.publisher import publish as send

    settings = ctx.of(context).settings
    report = send(
        settings,
        path,
        format=format,
        split=split,
        limit=limit,
        source=source,
        dry_run=dry_run,
        skip_bad=skip_bad,
        resume=resume,
        rejects=rejects,
    )
    Console().print(str(report), highlight=False, markup=False)
    if wait is not None and report.last:
        from streams.publish.publisher import wait_until_stored

        wait_until_stored(settings, report.last, wait)
    raise typer.Exit(report.exit_status)


@app.command("list")
def list_domains() -> None:
    """The domains and question sets that can be prepared, their licences and attributions."""
    from demo.data import DOMAINS, QUESTIONS

    table = Table("domain", "package", "licence", "attribution", title="Domains")
    for name, info in DOMAINS.items():
        table.add_row(name, str(info.package), info.licence, info.attribution)
    for name, questions in QUESTIONS.items():
        table.add_row(name, f"of {', '.join(questions.sources)}", questions.licence, "as the domains it is made of")
    Console().print(table)


@app.command()
def prepare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Domains or question sets, e.g. fluent3d vqa_base.")],
) -> None:
    """Download the packages of domains and render them as folder datasets under home/data; or make questions of them.

    Examples:  ratchet data prepare fluent3d flags    |    ratchet data prepare vqa_fashion
    """
    from demo.data import QUESTIONS, prepare_domain, prepare_questions

    for name in names:
        prepare = prepare_questions if name in QUESTIONS else prepare_domain
        typer.echo(prepare(name, ctx.of(context).settings.home))
