"""``ratchet doctor --tune``: measure how the base runs fastest here, and write it into the settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from core.errors import RatchetError
from core.loading import FILE, FILE_VARIABLE, update_section
from core.progress import say, step
from core.settings import Settings
from ops.cli.context import Context

if TYPE_CHECKING:
    from serving.engines.backends import EngineChoice
    from serving.engines.clip_base import ClipBase

MARK = "tuned"
"""File in ``home/engines`` that says that this was done."""


def run_tune(shared: Context) -> None:
    """Measure, print, write. Raises ConfigError, BaseModelError."""
    from serving.engines.clip_base import load_base
    from serving.engines.engine_choice import WORKLOADS
    from serving.engines.tuning import tune

    settings = shared.settings
    base = load_base(settings.home, settings.base.clip)

    def objection(choice: EngineChoice) -> str:
        return _objection(settings, base, choice)

    with step(f"measuring {base.name} on this machine (one to two minutes)"):
        tuning = tune(base, settings.home, say, objection)
    workloads = [f"{kind}s/s, {count} at once" for kind, count in WORKLOADS]
    engines = Table("engine", "precision", *workloads, "cosine to float32", title="Engines")
    for row in tuning.engines:
        rates = ["-" if row.error else f"{row.rate(number):.1f}" for number in range(len(WORKLOADS))]
        style = "bold" if row.choice == tuning.choice else ""
        engines.add_row(row.choice.engine, row.choice.precision, *rates, row.error or f"{row.cosine:.5f}", style=style)
    encoders = Table(
        "encoders", "threads of each", "images/s together", title=f"Encoders, batches of {tuning.max_batch}"
    )
    for layout in tuning.layouts:
        style = "bold" if layout == tuning.layout else ""
        encoders.add_row(str(layout.replicas), str(layout.threads), f"{layout.images_per_second:.1f}", style=style)
    console = Console()
    console.print(engines)
    console.print(encoders)
    path = shared.file or Path(os.environ.get(FILE_VARIABLE) or FILE)
    update_section(path, "serve", tuning.settings)
    console.print(_changes(settings, tuning.settings))
    console.print(f"Written to {path}; takes effect at the next start.", soft_wrap=True)
    mark = settings.home / "engines" / MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _objection(settings: Settings, base: ClipBase, choice: EngineChoice) -> str:
    """Why half precision must not serve: the base scores differently with it on a suite of the gate. Told suite by
    suite; empty when nothing is against it.
    """
    from serving.engines.backends import usable_cores
    from updater.gate.gate_command import engine_scores
    from updater.gate.suites import load_suites

    try:
        suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
        scores = engine_scores(base, choice, suites, usable_cores())
    except RatchetError as error:
        return f"the gate's suites could not be asked: {error.message}"
    for row in scores:
        say(f"{row.suite}: {row.float32:.3f} in float32, {row.served:.3f} with {choice}, noise {row.noise:.3f}")
    worse = [row.suite for row in scores if not row.within_noise]
    return f"other scores than float32 on {', '.join(worse)}" if worse else ""


def is_tuned(settings: Settings) -> bool:
    """Whether this home was ever tuned."""
    return (settings.home / "engines" / MARK).exists()


def _changes(settings: Settings, values: dict[str, Any]) -> Table:
    """What differs from the present settings, and what still goes before it."""
    table = Table("setting", "before", "now", title="Settings")
    for name, value in values.items():
        before = getattr(settings.serve, name)
        origin = settings.origins.get(f"serve.{name}", "default")
        shadowed = origin == "flag" or origin.startswith("environment")
        note = f" (the {origin} still says {before})" if shadowed else ""
        table.add_row(f"serve.{name}", str(before), f"{value}{note}", style="" if before == value else "bold")
    return table
