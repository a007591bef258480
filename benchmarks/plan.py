"""``ratchet bench plan``: encoders, ingest workers, memory, disk and cost of a load, from what benchmarks measured.

Nothing is run. The figures are those of ``measured.yaml``, or with ``--measured`` what ``ratchet bench encode`` printed
on your own machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.table import Table

from benchmarks.capacity import Load, built_in, machine_of, make_plan
from benchmarks.command import bench_parser, show_table
from core.settings import Settings

NOTE = "Load differs: measure yours before you buy (`ratchet bench encode`, docs/scaling.md)."


FLAGS = {
    "images_per_second": ("--images", "embeddings or classifications of images a second"),
    "texts_per_second": ("--texts", "embeddings of texts a second"),
    "searches_per_second": ("--searches", "searches a second"),
    "stream_per_day": ("--stream", "records a day that producers publish"),
    "image_kb": ("--image-kb", "size of an image of the stream, in KB"),
    "corpus": ("--corpus", "samples that searches are to find"),
    "p99_seconds": ("--p99", "seconds in which 99%% of requests are answered"),
    "backfill_hours": ("--backfill-hours", "for embedding the corpus again"),
    "price_hour": ("--price", "price of a machine for an hour"),
}
"""Flag and meaning of each field of a load."""
RATES = ("images_per_second", "texts_per_second", "searches_per_second", "stream_per_day", "corpus")


def main(settings: Settings, arguments: Sequence[str]) -> None:
    figures, parser = built_in(), bench_parser("plan", __doc__)
    for field in fields(Load):
        flag, meaning = FLAGS[field.name]
        parser.add_argument(
            flag, dest=field.name, type=float, default=field.default, help=f"{meaning} ({field.default:g})"
        )
    parser.add_argument("--machine", choices=figures.machines, default="amx", help="two cores, ViT-B-32 (amx)")
    parser.add_argument("--measured", type=Path, help="output of `ratchet bench encode`, in place of --machine")
    options = vars(parser.parse_args(arguments))
    measured, machine = options.pop("measured"), options.pop("machine")
    if not any(options[name] for name in RATES):
        parser.error(f"there is no load: give one of {', '.join(FLAGS[name][0] for name in RATES)}")
    load = Load(**options)
    plan = make_plan(load, figures, machine_of(measured) if measured else figures.machines[machine])
    table = Table("part", "how many", "", "why", title="Plan")
    for part in plan.parts:
        table.add_row(part.name, f"{part.count:g}", part.unit, part.why)
    lines = [*(f"! {warning}" for warning in plan.warnings), "Counted with:", *(f"  {each}" for each in plan.sources)]
    show_table(table, {"load": asdict(load), **asdict(plan)}, "\n".join([*lines, NOTE]))
