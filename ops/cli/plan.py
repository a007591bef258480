"""``ratchet plan``: how many machines a load needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from core.errors import ConfigError
from ops.planning.capacity import Load, Plan, make_plan
from ops.planning.measured import built_in, machine_of


def plan(
    images: Annotated[float, typer.Option(help="Embeddings or classifications of images a second.")] = 0.0,
    texts: Annotated[float, typer.Option(help="Embeddings of texts a second.")] = 0.0,
    searches: Annotated[float, typer.Option(help="Searches a second.")] = 0.0,
    stream: Annotated[float, typer.Option(help="Records a day that producers publish.")] = 0.0,
    image_kb: Annotated[float, typer.Option(help="Size of an image of the stream, in KB.")] = 100.0,
    corpus: Annotated[float, typer.Option(help="Samples that searches are to find.")] = 0.0,
    p99: Annotated[float, typer.Option(help="Seconds within which 99% of requests are to be answered.")] = 1.0,
    backfill_hours: Annotated[float, typer.Option(help="Hours in which the corpus is to be embedded anew.")] = 24.0,
    price: Annotated[float, typer.Option(help="Price of a machine for an hour.")] = 0.0,
    machine: Annotated[
        str, typer.Option(help="Measured machine to count with: amx or avx512 (two cores, ViT-B-32).")
    ] = "amx",
    measured: Annotated[
        Path | None, typer.Option(help="What `ratchet bench encode` printed on your own machine, in place of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Count encoders, ingest workers, memory, disk and cost for a load, from what benchmarks measured.

    Examples:  ratchet plan --images 200 --searches 50 --corpus 5e6    |    ratchet plan --stream 2e6 --image-kb 80    |
    ratchet bench encode --against none | tee encode.txt; ratchet plan --texts 1000 --measured encode.txt
    """
    figures = built_in()
    if measured is None and machine not in figures.machines:
        raise ConfigError(f"no machine {machine!r} was measured.", f"There are: {', '.join(figures.machines)}.")
    node = machine_of(measured) if measured is not None else figures.machines[machine]
    load = Load(images, texts, searches, stream, image_kb, corpus, p99, backfill_hours, price)
    counted = make_plan(load, figures, node)
    if as_json:
        typer.echo(json.dumps({"load": dataclasses.asdict(load), **dataclasses.asdict(counted)}))
        return
    _show(counted)


def _show(counted: Plan) -> None:
    console = Console()
    table = Table("part", "how many", "", "why", title="Plan")
    table.columns[1].justify = "right"
    for part in counted.parts:
        table.add_row(part.name, f"{part.count:,g}", part.unit, part.why)
    console.print(table)
    for warning in counted.warnings:
        console.print(f"[yellow]![/yellow] {warning}", highlight=False)
    console.print("Counted with:", *(f"  {source}" for source in counted.sources), sep="\n", highlight=False)
    console.print("Load differs: measure yours before you buy (`ratchet bench encode`, docs/scaling.md).")
