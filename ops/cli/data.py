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
    path: Annotated[Path, typer.Argument(help="A folder with data.csv and images, or a CSV or JSONL file.")],
    split: Annotated[str | None, typer.Option(help="Only rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many.")] = None,
    source: Annotated[str | None, typer.Option(help="Recorded as the source of each sample.")] = None,
) -> None:
    """Send image-text samples to the Kafka topic, and report what the broker acknowledged.

    Examples:  ratchet publish photos/    |    ratchet publish samples.jsonl --limit 100
    """
    from streams.producer import publish as send

    report = send(ctx.of(context).settings, path, split=split, limit=limit, source=source)
    Console().print(str(report), highlight=False)


@app.command("list")
def list_domains() -> None:
    """The domains and question sets that can be prepared, their licences and attributions."""
    from streams.demo import DOMAINS, QUESTIONS

    table = Table("domain", "package", "licence", "attribution", title="Domains")
    for name, info in DOMAINS.items():
        table.add_row(name, str(info.package), info.licence, info.attribution)
    for name, made in QUESTIONS.items():
        table.add_row(name, f"of {', '.join(made.sources)}", made.licence, "as the domains it is made of")
    Console().print(table)


@app.command()
def prepare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Domains or question sets, e.g. fluent3d vqa_base.")],
) -> None:
    """Download the packages of domains and render them as folder datasets under home/data; or make questions of them.

    Examples:  ratchet data prepare fluent3d flags    |    ratchet data prepare vqa_fashion
    """
    from streams.demo import QUESTIONS, prepare_domain, prepare_questions

    for name in names:
        prepare = prepare_questions if name in QUESTIONS else prepare_domain
        typer.echo(prepare(name, ctx.of(context).settings.home))
