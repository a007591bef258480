"""``ratchet bench backlog``: an updater facing a million pending pairs, with the default budget.

The pairs are written straight into the sample store; then ``ratchet trainer`` runs as usual, with its settings and the
default recipe, on the shipped base and its reference pool. After each update more pairs arrive, and an update that
passed is released as the controller would. The gate asks one small suite, and fresh ones from the store.

Every pending pair of an update must be visited or counted as passed over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.backlog.pairs import pair_rows
from benchmarks.backlog.trainer import Watched, watch
from benchmarks.bench_home import bench_home, clip_base
from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.stream.filling import fill
from core.addresses import free_port
from core.ledger import Ledger, UpdateRow
from core.progress import step
from core.settings import Settings
from streams.publish.folders import FolderItem, write_folder
from tests.support.inputs import pictures
from updater.bases import reference_folders
from updater.service.triggers import planned_gflops

SUITE_ITEMS = 120
ARRIVALS = 0.02
"""New pairs after each update, as a share of the backlog."""
UPDATE_SECONDS = 3600.0


def run(settings: Settings, pairs: int = 1_000_000, updates: int = 3) -> dict[str, Any]:
    """Measure on a new home with the settings' CLIP. Returns the figures. Raises RatchetError if the base is not
    registered, or an update does not end.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        ours = _settings(settings, Path(folder))
        make = pair_rows(ours.ingest.fresh_eval_share)
        stored = pairs
        fill(ours.lake, pairs, 0, make)

        def arrive(update: UpdateRow) -> None:
            nonlocal stored
            _release(ours, update)
            more = stored + max(2 * ours.updater.min_new_samples, round(pairs * ARRIVALS))
            fill(ours.lake, more, stored, make)
            stored = more

        with step(f"{updates} updates"):
            seen = watch(ours, Path(folder) / "backlog.yaml", updates, UPDATE_SECONDS, arrive)
        return _figures(ours, seen, pairs)


def _settings(settings: Settings, home: Path) -> Settings:
    reference = [folder.resolve() for folder in reference_folders(settings)]
    ours = bench_home(settings, home, clip_base(settings, settings.base.clip))
    items = [
        FolderItem(Path(f"{n}.png"), f"picture {n}", inline=image) for n, image in enumerate(pictures(SUITE_ITEMS))
    ]
    write_folder(home / "data" / "backlog", items)
    suite = home / "suite.yaml"
    suite.write_text("name: backlog\ntask: retrieval\ndata: ${home}/data/backlog\n")
    metrics, nobody = free_port(), f"http://127.0.0.1:{free_port()}"
    return ours.model_copy(
        update={
            "base": ours.base.model_copy(update={"vlm": ""}),
            # only the trainer is measured: it does not wait for the gate, for which there are few captions
            "updater": ours.updater.model_copy(
                update={"reference": reference, "metrics_port": metrics, "wait_for_items": False}
            ),
            "console": ours.console.model_copy(update={"server": nobody}),  # no server here slows the trainer
            "gate": ours.gate.model_copy(update={"suites": [suite]}),
        }
    )


def _release(settings: Settings, update: UpdateRow) -> None:
    ledger = Ledger.open(settings.ledger)
    try:
        for proposal in ledger.pending_proposals():
            live = ledger.live()
            ledger.commit_release(
                (live.number if live else 0) + 1, clip=update.adapter, vlm=None, actor="bench", reason="passed",
                proposal_id=proposal.id,
            )  # fmt: skip
    finally:
        ledger.close()


def _figures(settings: Settings, seen: Watched, pairs: int) -> dict[str, Any]:
    done = [update for update in seen.updates if update.state == "done"]

    budget = planned_gflops(settings)

    def total(name: str) -> int:
        return sum(int(update.cost.get(name, 0)) for update in done)

    return {
        "pairs": pairs,
        "memory_gib": round(seen.memory / 2**30, 3),
        "first_step_seconds": round(seen.first_step_seconds, 1),
        "updates": len(done),
        "errors": len(seen.updates) - len(done) + seen.restarts,
        "problems": [update.error for update in seen.updates if update.error],
        "pending": total("pending"),
        "visited": total("visited"),
        "passed_over": total("passed_over"),
        "over_budget": sum(float(update.cost.get("gflops_spent", 0.0)) > budget for update in seen.updates),
        "by_update": [
            {
                name: update.cost.get(name)
                for name in (
                    "pending",
                    "visited",
                    "passed_over",
                    "steps",
                    "seconds",
                    "truncated",
                    "budget_spent",
                    "gflops_spent",
                )
            }
            for update in done
        ],
        "gflops_per_update": budget,
        "threads": settings.updater.threads,
        "base": settings.base.clip,
        "machine": machine(),
    }


def show(figures: dict[str, Any]) -> None:
    columns = ("pending", "visited", "passed_over", "steps", "seconds")
    table = Table("update", *(name.replace("_", " ") for name in columns), title=f"{figures['pairs']:,} pairs at once")
    for number, update in enumerate(figures["by_update"], 1):
        table.add_row(str(number), *(f"{update[name]:,.0f}" for name in columns))
    table.caption = (
        f"{figures['memory_gib']} GiB at most, the first step after {figures['first_step_seconds']} s,"
        f" {figures['errors']} errors"
    )
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("backlog", __doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs that are stored at once (1,000,000)")
    parser.add_argument("--updates", type=int, default=3, help="updates that are watched (3)")
    options = parser.parse_args(arguments)
    show(run(settings, pairs=options.pairs, updates=options.updates))
