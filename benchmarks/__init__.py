"""Benchmarks by name, for ``ratchet bench NAME``. Each prints a table and ends with one line of JSON."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from core.errors import ConfigError
from core.settings import Settings

BENCHMARKS = {
    "agreement": "benchmarks.agreement",
    "backlog": "benchmarks.backlog.run_backlog",
    "chaos": "benchmarks.chaos",
    "cluster": "benchmarks.cluster.run_cluster",
    "continual": "benchmarks.continual.run_continual",
    "duty": "benchmarks.duty",
    "encode": "benchmarks.encode.run_encode",
    "families": "benchmarks.families",
    "gate": "benchmarks.gate",
    "heads": "benchmarks.heads",
    "hostile": "benchmarks.hostile",
    "ingest": "benchmarks.stream.ingest",
    "lifetime": "benchmarks.lifetime",
    "scale": "benchmarks.scale",
    "search": "benchmarks.search.run_search",
    "soak": "benchmarks.soak",
    "step": "benchmarks.step",
    "swap": "benchmarks.swap",
    "traces": "benchmarks.traces",
    "variety": "benchmarks.variety.run_variety",
    "vqa": "benchmarks.vqa",
}
"""Name to module; a module has ``main(settings, arguments)``."""
WITHOUT_MODELS = frozenset({"chaos", "families", "ingest", "lifetime", "search", "variety"})
"""These need no base."""


def main_of(name: str) -> Callable[[Settings, list[str]], None]:
    """The function that runs a benchmark with its own flags. Raises ConfigError when none has that name."""
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}.", f"There are: {', '.join(sorted(BENCHMARKS))}.")
    found: Callable[[Settings, list[str]], None] = importlib.import_module(BENCHMARKS[name]).main
    return found
