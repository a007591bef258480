"""``ratchet bench``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from core.errors import ConfigError
from core.stop_signals import stop_on_signals
from ops.cli import context as ctx
from ops.cli.shipped import make_base_ready

CHECKOUT = Path(__file__).parents[2]


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Benchmark, e.g. swap.")],
) -> None:
    """Run a benchmark of a checkout: a table, then one line of JSON. Its flags follow its name; `-- --help` tells them.

    Examples:  ratchet bench swap    |    ratchet bench swap --swaps 40    |    ratchet bench swap -- --help
    """
    if not (CHECKOUT / "benchmarks" / "__init__.py").exists():
        raise ConfigError(
            "benchmarks are not part of an installation.", "Clone the repository, and run `make check` and this in it."
        )
    sys.path.insert(0, str(CHECKOUT))
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of the processes that benchmarks start
    benchmarks = importlib.import_module("benchmarks")
    main = benchmarks.main_of(name)
    stop_on_signals()  # a benchmark ends what it started, as on Ctrl-C
    if name not in benchmarks.WITHOUT_MODELS:
        make_base_ready(ctx.of(context).settings)
    main(ctx.of(context).settings, context.args)
