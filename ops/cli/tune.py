"""``ratchet doctor --tune``: measures how the base runs fastest here, and writes it into the settings."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from core.errors import RatchetError
from core.loading import FILE, FILE_VARIABLE, update_section
from core.progress import progress_log, step
from core.settings import Settings
from ops.cli.context import Context
from ops.cli.terminal import show_rows

if TYPE_CHECKING:
    from serving.engines.clip_base import ClipBase
    from serving.engines.processor import Precision

MARK = "tuned"
"""File in ``home/engines`` that marks a tuned home."""


def run_tune(shared: Context) -> None:
    """Measure, print and write. Raises ConfigError, BaseModelError."""
    from serving.engines.clip_base import load_base
    from serving.engines.precision import WORKLOADS
    from serving.engines.tuning import tune

    settings = shared.settings
    base = load_base(settings.home, settings.base.clip)
    with step(f"measuring {base.name} on this machine (one to two minutes)"):
        tuning = tune(base, settings.home, progress_log.info, partial(_objection, settings, base))
    workloads = [f"{kind}s/s, {count} at once" for kind, count in WORKLOADS]
    precisions = (
        {
            "precision": row.precision,
            **{name: "-" if row.error else f"{row.rate(number):.1f}" for number, name in enumerate(workloads)},
            "cosine to float32": row.error or f"{row.cosine:.5f}", "chosen": row.precision == tuning.precision,
        }
        for row in tuning.precisions
    )  # fmt: skip
    encoders = (
        {"encoders": each.replicas, "threads of each": each.threads, "images/s together": each.images_per_second,
         "chosen": each == tuning.layout}
        for each in tuning.layouts
    )  # fmt: skip
    show_rows(precisions, "Precisions")
    show_rows(encoders, f"Encoders, batches of {tuning.max_batch}")
    path = shared.file or Path(os.environ.get(FILE_VARIABLE) or FILE)
    update_section(path, "serve", tuning.settings)
    show_rows([_change(settings, name, value) for name, value in tuning.settings.items()], "Settings")
    typer.echo(f"Written to {path}; takes effect at the next start.")
    mark = settings.home / "engines" / MARK
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _objection(settings: Settings, base: ClipBase, precision: Precision) -> str:
    """Reason against serving in a precision: other scores on a suite of the gate. Empty if there is none."""
    from serving.engines.processor import usable_cores
    from updater.gate.gate_command import precision_scores
    from updater.gate.suites import load_suites

    try:
        suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
        scores = precision_scores(base, precision, suites, usable_cores())
    except RatchetError as error:
        return f"the gate's suites could not be asked: {error.message}"
    for row in scores:
        progress_log.info(
            f"{row.suite}: {row.float32:.3f} in float32, {row.served:.3f} in {precision}, noise {row.noise:.3f}"
        )
    worse = [row.suite for row in scores if not row.within_noise]
    return f"other scores than float32 on {', '.join(worse)}" if worse else ""


def is_tuned(settings: Settings) -> bool:
    return (settings.home / "engines" / MARK).exists()


def _change(settings: Settings, name: str, value: Any) -> dict[str, str]:
    """A setting before and after, and a higher-ranking origin that still overrides it."""
    before, origin = getattr(settings.serve, name), settings.origins.get(f"serve.{name}", "default")
    shadowed = origin == "flag" or origin.startswith("environment")
    note = f" (the {origin} still says {before})" if shadowed else ""
    return {"setting": f"serve.{name}", "before": str(before), "now": f"{value}{note}"}
