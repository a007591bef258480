"""Benchmarks by name, for ``ratchet bench NAME``. Each prints a table and ends with one line of JSON."""

from __future__ import annotations

import difflib
import importlib

from core.errors import ConfigError
from core.settings import Settings

BENCHMARKS = {
    "agreement": "benchmarks.agreement",
    "backlog": "benchmarks.backlog.run_backlog",
    "calibration": "benchmarks.calibration",
    "chaos": "benchmarks.chaos",
    "cluster": "benchmarks.cluster.run_cluster",
    "continual": "benchmarks.continual.run_continual",
    "duty": "benchmarks.duty",
    "encode": "benchmarks.encode.run_encode",
    "families": "benchmarks.families",
    "feedback": "benchmarks.feedback.run_feedback",
    "gate": "benchmarks.gate",
    "heads": "benchmarks.heads",
    "hostile": "benchmarks.hostile",
    "index": "benchmarks.index.run_index",
    "ingest": "benchmarks.stream.ingest",
    "lifetime": "benchmarks.lifetime",
    "plan": "benchmarks.plan",
    "precision": "benchmarks.precision",
    "rerank": "benchmarks.rerank",
    "scale": "benchmarks.scale",
    "search": "benchmarks.search.run_search",
    "soak": "benchmarks.soak",
    "start": "benchmarks.start",
    "step": "benchmarks.step",
    "swap": "benchmarks.swap",
    "traces": "benchmarks.traces",
    "trust": "benchmarks.trust",
    "variety": "benchmarks.variety.run_variety",
    "vqa": "benchmarks.vqa",
}
"""Name to module; a module has ``main(settings, arguments)``."""
WITHOUT_MODELS = frozenset(
    {"chaos", "families", "feedback", "index", "ingest", "lifetime", "plan", "search", "start", "variety"}
)


def run(name: str, settings: Settings, arguments: list[str]) -> None:
    """Run a benchmark with its own flags, after building the shipped bases if it uses them. Raises ConfigError if no
    benchmark has this name.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS) or sorted(BENCHMARKS)
        raise ConfigError(f"there is no benchmark {name!r}.", f"Did you mean {' or '.join(near)}?")
    main = importlib.import_module(BENCHMARKS[name]).main
    if name not in WITHOUT_MODELS and not {"-h", "--help"} & {*arguments}:
        from demo.first_start import make_clip, make_vlm

        make_clip(settings)
        make_vlm(settings)
    main(settings, arguments)
