"""``ratchet bench chaos --part serving``: does a server answer, and roll back, whatever happens around it?

A whole server with its own PostgreSQL, object store and lake, under open-loop load of embeddings, classification,
search and chat. One state after the other is entered and left: a store that is down, slow or full, a process that is
killed between two steps of a release, a second server on the same stores. In each a rollback is requested. In the end
every answer is compared with that of its release.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.command import bench_parser
from benchmarks.machine import machine
from benchmarks.samples import wait_until_searchable
from benchmarks.serving.chaos_audit import audit, totals
from benchmarks.serving.chaos_installation import ChaosInstallation
from benchmarks.serving.chaos_plan import STATES, State, plan, states_of
from benchmarks.serving.chaos_states import Chaos
from benchmarks.serving.operator import Operator
from core.errors import ConfigError
from core.progress import progress_log, step
from core.settings import Settings
from demo.load.traffic import Traffic
from tests.support.inputs import QUESTIONS

TEXTS: Final = ("a photo of a cat", "a red circle", "an old map", "two birds")
NEW_ADAPTERS: Final = 4
"""Preparation of the states of the object store."""
VIOLATIONS: Final = ("failed_beyond_killed", "mixed", "rollbacks_failed", "refusals_not_503", "problems")
ROLLBACK_LIMIT_SECONDS: Final = 1.0
REFUSAL_LIMIT_SECONDS: Final = 1.0


def run(
    settings: Settings, seconds: float, states: Sequence[State], seed: int, rate: float, vlm_engine: str, folder: Path
) -> dict[str, Any]:
    """Run on new stores and homes in ``folder``, where the logs stay. Returns the figures.

    Args:
        rate: requests a second.
        vlm_engine: ``vllm``, ``transformers`` or ``auto``; empty: no VLM is served.

    Raises RatchetError if a store or the server does not start.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with step("starting the stores"):
            installation = ChaosInstallation(settings, folder, vlm_engine, NEW_ADAPTERS, stack)
        server = installation.server()
        with step("starting the server"):
            server.start()
            with server.client(20.0) as client:
                wait_until_searchable(client, len(installation.sample_ids))
        images, questions = installation.images, QUESTIONS if vlm_engine else ()
        load = Traffic(
            server.url, images=images, texts=TEXTS, questions=[(images[0], text) for text in questions],
            settings=installation.direct, rate=rate, sample_ids=installation.sample_ids,
        )  # fmt: skip
        with load:
            running = Chaos(installation, server, Operator(installation.clips, installation.vlms), load, seed)
            running.prepare()
            reports = [running.enter(phase) for phase in plan(seconds, seed, states)]
        with step("comparing every answer"):
            report = load.report()
        audit(reports, report.samples)
        for text in report.problems:
            progress_log.error(text)
        return {
            **totals(reports),
            "seconds": round(time.time() - began, 1),
            "rate": rate,
            "vlm": vlm_engine or "none",
            "seed": seed,
            "machine": machine(),
        }


def violations(figures: dict[str, Any]) -> list[str]:
    wrong = [f"{name} {figures[name]}" for name in VIOLATIONS if figures[name]]
    limits = (("rollback_seconds_max", ROLLBACK_LIMIT_SECONDS), ("refusal_seconds_max", REFUSAL_LIMIT_SECONDS))
    return wrong + [f"{name} {figures[name]}" for name, limit in limits if figures[name] >= limit]


def show(figures: dict[str, Any]) -> None:
    table = Table("state", "requests", "failed", "on killed", "mixed", "rollbacks (s)", "refused (s)", "problems")
    for state in figures["states"]:
        if "skipped" in state:
            table.add_row(state["state"], "skipped", state["skipped"])
            continue
        refusals = " ".join(f"{each['seconds']:.2f}" for each in state["refusals"])
        rollbacks = " ".join(f"{each:.2f}" for each in state["rollback_seconds"])
        counts = [str(state[name]) for name in ("requests", "failed_beyond_killed", "failed_on_killed", "mixed")]
        table.add_row(state["state"], *counts, rollbacks, refusals, "; ".join(state["problems"]))
    console = Console()
    console.print(table)
    for state in figures["states"]:
        for text in state.get("evidence", ()):
            console.print(f"{state['state']}: {text}", markup=False)
    print("Rollbacks count from the request, or from the return of the ledger; refused ones were asked for before it.")
    print(json.dumps(figures), flush=True)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Ends with status 1 when a request or a rollback failed or was late."""
    parser = bench_parser("chaos --part serving", __doc__)
    parser.add_argument("--seconds", type=float, default=900, help="time in all states together (900)")
    parser.add_argument("--states", default="", help=f"names with commas (all): {', '.join(STATES)}")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (6)")
    parser.add_argument(
        "--vlm", choices=["auto", "vllm", "transformers", "none"], default="auto", help="engine of a tiny VLM (auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order and of what is killed when (0)")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs of the processes")
    options = parser.parse_args(arguments)
    try:
        states = states_of(options.states)
    except ValueError as error:
        raise ConfigError(f"--states: {error}.", "Name states with commas between them.") from None
    engine = "" if options.vlm == "none" else options.vlm
    with tempfile.TemporaryDirectory(prefix="ratchet-chaos-") as temporary:
        folder = options.logs or Path(temporary)
        figures = run(settings, options.seconds, states, options.seed, options.rate, engine, folder)
    show(figures)
    if wrong := violations(figures):
        progress_log.error(f"{', '.join(wrong)}")
        raise SystemExit(1)
