"""``ratchet bench plan``: encoders, ingest workers, memory, disk and cost of a load, from what benchmarks measured.

Nothing is run. The figures are those of ``measured.yaml``, or with ``--measured`` what ``ratchet bench encode`` printed
on your own machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from benchmarks.capacity import Load, built_in, machine_of, make_plan
from benchmarks.command import bench_parser, show_table
from core.settings import Settings

NOTE = "Load differs: measure yours before you buy (`ratchet bench encode`, docs/scaling.md)."


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("plan", __doc__)
    parser.add_argument("--images", type=float, default=0.0, help="embeddings or classifications of images a second")
    parser.add_argument("--texts", type=float, default=0.0, help="embeddings of texts a second")
    parser.add_argument("--searches", type=float, default=0.0, help="searches a second")
    parser.add_argument("--stream", type=float, default=0.0, help="records a day that producers publish")
    parser.add_argument("--image-kb", type=float, default=100.0, help="size of an image of the stream, in KB (100)")
    parser.add_argument("--corpus", type=float, default=0.0, help="samples that searches are to find")
    parser.add_argument("--p99", type=float, default=1.0, help="seconds in which 99%% of requests are answered (1)")
    parser.add_argument("--backfill-hours", type=float, default=24.0, help="for embedding the corpus again (24)")
    parser.add_argument("--price", type=float, default=0.0, help="price of a machine for an hour")
    figures = built_in()
    parser.add_argument("--machine", choices=figures.machines, default="amx", help="two cores, ViT-B-32 (amx)")
    parser.add_argument("--measured", type=Path, help="output of `ratchet bench encode`, in place of --machine")
    options = parser.parse_args(arguments)
    load = Load(options.images, options.texts, options.searches, options.stream, options.image_kb, options.corpus,
                options.p99, options.backfill_hours, options.price)  # fmt: skip
    if not (load.images_per_second or load.texts_per_second or load.searches_per_second or load.stream_per_day
            or load.corpus):  # fmt: skip
        parser.error("there is no load: give --images, --texts, --searches, --stream or --corpus")
    node = machine_of(options.measured) if options.measured else figures.machines[options.machine]
    plan = make_plan(load, figures, node)
    table = Table("part", "how many", "", "why", title="Plan")
    for part in plan.parts:
        table.add_row(part.name, f"{part.count:g}", part.unit, part.why)
    told = [*(f"! {warning}" for warning in plan.warnings), "Counted with:", *(f"  {each}" for each in plan.sources)]
    show_table(table, {"load": asdict(load), **asdict(plan)}, "\n".join([*told, NOTE]))
