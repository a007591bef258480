"""``ratchet bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from core.stop_signals import stop_on_signals
from ops.cli import context as ctx


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Benchmark, e.g. swap.")],
) -> None:
    """Run a benchmark: a table, then one line of JSON. Its own flags follow its name; `-- --help` tells them.

    Examples:  ratchet bench swap    |    ratchet bench swap --swaps 40    |    ratchet bench swap -- --help
    """
    from benchmarks import WITHOUT_MODELS, run
    from ops.cli.shipped import make_base_ready

    stop_on_signals()  # a benchmark ends what it started, as on Ctrl-C
    if name not in WITHOUT_MODELS:
        make_base_ready(ctx.of(context).settings)
    run(name, ctx.of(context).settings, context.args)
