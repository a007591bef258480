"""``ratchet demo``, and commands for the shipped bases; :func:`add_to` is an entry point of ``ratchet.commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.errors import ConfigError, RatchetError
from core.stop_signals import Stopped, stop_on_signals
from ops.cli import bases
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, show_rows

app = typer.Typer()
data = typer.Typer(help="Free image-text data that package registries ship.", no_args_is_help=True)


def add_to(ratchet: typer.Typer) -> None:
    app.add_typer(data, name="data")
    ratchet.add_typer(app, name="demo", rich_help_panel="Run")
    bases.app.command()(build)
    bases.app.command()(score)


@app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where the demo keeps everything.")] = Path(".ratchet/demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running at the end, until Ctrl-C.")] = False,
    with_vlm: Annotated[
        bool, typer.Option("--with-vlm", help="Tell the story of the vision-language model as well: minutes more.")
    ] = False,
) -> None:
    """Show the whole loop in eight minutes: stream, learn, reject, pass, swap under load, roll back.

    Examples:  ratchet demo    |    ratchet demo --with-vlm
    """
    if context.invoked_subcommand is not None:
        return
    from demo.story.story import tell

    stop_on_signals()
    try:
        tell(folder, keep=keep, with_vlm=with_vlm)
    except Stopped:
        raise RatchetError("the demo was stopped.", "Start it again with `ratchet demo`.") from None


@data.command("list")
def list_domains(as_json: AsJson = False) -> None:
    """The domains and question sets that can be prepared, their licences and attributions."""
    from demo.data import DOMAINS, QUESTIONS

    domains = [
        {"domain": name, "package": str(info.package), "licence": info.licence, "attribution": info.attribution}
        for name, info in DOMAINS.items()
    ]
    questions = [
        {"domain": name, "package": f"of {', '.join(each.sources)}", "licence": each.licence,
         "attribution": "as the domains it is made of"}
        for name, each in QUESTIONS.items()
    ]  # fmt: skip
    show_rows([*domains, *questions], "Domains", as_json)


@data.command()
def prepare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Domains or question sets, e.g. fluent3d vqa_base.")],
) -> None:
    """Download the packages of domains and render them as folder datasets under home/data; or make questions of them.

    Examples:  ratchet demo data prepare fluent3d flags    |    ratchet demo data prepare vqa_fashion
    """
    from demo.data import DemoData

    for name in names:
        typer.echo(DemoData(name).prepare(ctx.of(context).settings.home))


def build(
    context: typer.Context,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again (CLIP minutes, VLM half an hour), not from committed assets.")
    ] = False,
    family: bases.FamilyOption = None,
) -> None:
    """Make the bases 'shipped' (CLIP) and 'shipped-vlm' from what PyPI and this package ship: no hub is needed.

    Examples:  ratchet base build    |    ratchet base build --family vlm --retrain
    """
    from demo.clip import build_base
    from demo.vlm import build_vlm

    home = ctx.of(context).settings.home
    if family in (None, "clip"):
        typer.echo(bases.line(build_base(home, retrain=retrain)))
    if family in (None, "vlm"):
        typer.echo(bases.line(build_vlm(home, retrain=retrain)))


def score(
    context: typer.Context,
    family: bases.FamilyOption = None,
    precision: Annotated[
        str, typer.Option(help="Of the CLIP: float32, bfloat16, float16, int8; float32 is shown next to another one.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Score the shipped bases: the CLIP on the built-in domains, the VLM on its questions. Takes minutes.

    Examples:  ratchet base score --family vlm    |    ratchet base score --family clip --precision bfloat16
    """
    from core.settings.serving import SHIPPED_VLM
    from demo.clip import score_base
    from demo.vlm import score_vlm
    from serving.engines.processor import DTYPES
    from serving.engines.vlm.vlm_base import load_vlm_base

    home = ctx.of(context).settings.home
    if precision not in DTYPES:
        raise ConfigError(f"{precision!r} is not a precision.", f"Choose one of {', '.join(DTYPES)}.")
    scores: dict[str, dict[str, dict[str, float]]] = {}
    if family in (None, "clip"):
        scores["CLIP"] = score_base(home)
        if precision != "float32":
            scores[f"CLIP in {precision}"] = score_base(home, precision=precision)
    if family in (None, "vlm"):
        scores["VLM"] = score_vlm(load_vlm_base(home, SHIPPED_VLM))
    rows = (
        {"model": model, "asked": asked, "metric": metric, "score": value}
        for model, domains in scores.items() for asked, figures in domains.items() for metric, value in figures.items()
    )  # fmt: skip
    show_rows(rows, "Scores", as_json)
