"""``ratchet base``: the frozen checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from core.errors import ConfigError
from core.ledger.rows import Family
from ops.cli import base_upgrade
from ops.cli import context as ctx

if TYPE_CHECKING:
    from serving.engines.clip_base import ClipBase
    from serving.engines.vlm.vlm_base import VlmBase

app = typer.Typer(help="Frozen base checkpoints that adapters are trained against.", no_args_is_help=True)


_FAMILY = Annotated[Family | None, typer.Option(help="Only this one; both otherwise.")]
_NAMES = Annotated[list[str], typer.Argument(help="Names of bases.")]


@app.command()
def build(
    context: typer.Context,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again (CLIP minutes, VLM half an hour), not from committed assets.")
    ] = False,
    family: _FAMILY = None,
) -> None:
    """Make the bases 'shipped' (CLIP) and 'shipped-vlm' from what PyPI and this package ship: no hub is needed.

    Examples:  ratchet base build    |    ratchet base build --family vlm --retrain
    """
    from demo.clip import build_base
    from demo.vlm import build_vlm

    home = ctx.of(context).settings.home
    if family in (None, "clip"):
        _show(build_base(home, retrain=retrain))
    if family in (None, "vlm"):
        _show(build_vlm(home, retrain=retrain))


@app.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name to register it under.")],
    model: Annotated[
        str, typer.Option(help="CLIP: open_clip model name (ViT-B-16). VLM: a folder. Both: hf-hub:NAME.")
    ],
    weights: Annotated[Path | None, typer.Option(help="CLIP: safetensors file; not for hf-hub: names.")] = None,
    family: Annotated[Family, typer.Option(help="Kind of model.")] = "clip",
) -> None:
    """Register any open_clip model or Hugging Face VLM as a base. Serve it with --set base.clip=NAME or base.vlm=NAME.

    Examples:  ratchet base add b16 --model ViT-B-16 --weights b16.safetensors    |
    ratchet base add l14 --model hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K    |
    ratchet base add smol --family vlm --model hf-hub:HuggingFaceTB/SmolVLM-256M-Instruct
    """
    from updater.bases.register import add_base, add_vlm

    home = ctx.of(context).settings.home
    if family == "clip":
        _show(add_base(home, name, model=model, weights=weights))
    elif weights is not None:
        raise ConfigError("--weights is for a CLIP.", "Put the weights into the VLM's folder and name that: --model.")
    else:
        _show(add_vlm(home, name, model))


@app.command("list")
def list_bases(context: typer.Context, family: _FAMILY = None) -> None:
    """The registered bases; a star marks those that the settings name."""
    settings = ctx.of(context).settings
    table = Table("", "name", "family", "digest", "model", title="Bases")
    for base in _registered(settings.home, family):
        live = "*" if base.name in (settings.base.clip, settings.base.vlm) else ""
        table.add_row(live, base.name, base.family, base.digest[:12], _model(base))
    Console().print(table)


@app.command()
def show(context: typer.Context, names: _NAMES) -> None:
    """What a base is: its files' digest, where it came from, which layers can carry LoRA.

    Example:  ratchet base show shipped-vlm
    """
    bases = {base.name: base for base in _registered(ctx.of(context).settings.home, None)}
    for name in names:
        if name not in bases:
            raise ConfigError(f"there is no base {name!r}.", f"Registered: {', '.join(bases) or 'none'}.")
        _describe(bases[name])


@app.command()
def push(context: typer.Context, names: _NAMES) -> None:
    """Store bases in the artifacts, so that other machines can `pull` them.

    Example:  ratchet --set artifacts_url=s3://models/ratchet base push b16
    """
    from core.artifacts import Artifacts
    from updater.bases.register import push_base

    settings = ctx.of(context).settings
    for name in names:
        push_base(settings.home, name, Artifacts(settings.artifacts))


@app.command()
def pull(context: typer.Context, names: _NAMES) -> None:
    """Fetch bases that were pushed. Pods do this before they start.

    Example:  ratchet --set artifacts_url=s3://models/ratchet base pull b16
    """
    from updater.bases.register import pull_base

    settings = ctx.of(context).settings
    for name in names:
        typer.echo(pull_base(settings.home, name, settings.artifacts))


app.command()(base_upgrade.upgrade)
app.command()(base_upgrade.switch)


def _describe(base: Any) -> None:
    table = Table("what", "value", title=f"Base {base.name}", show_header=False)
    rows = {"family": base.family, "digest": base.digest, "folder": base.directory, "model": _model(base)}
    for what, value in {**rows, **base.about}.items():
        table.add_row(what, str(value))
    for part, pattern in base.lora_targets.items():
        table.add_row(f"LoRA in {part}", pattern)
    Console().print(table)


@app.command()
def score(
    context: typer.Context,
    family: _FAMILY = None,
    precision: Annotated[
        str, typer.Option(help="Of the CLIP: float32, bfloat16, float16; float32 is shown beside another one.")
    ] = "float32",
) -> None:
    """Score the shipped bases: the CLIP on the built-in domains, the VLM on its questions. Takes minutes.

    Examples:  ratchet base score --family vlm    |    ratchet base score --family clip --precision bfloat16
    """
    from core.settings.serving import SHIPPED_VLM
    from demo.clip import score_base
    from demo.vlm import score_vlm
    from serving.engines.backends import DTYPES, EngineChoice
    from serving.engines.vlm.vlm_base import load_vlm_base

    home = ctx.of(context).settings.home
    if family in (None, "clip"):
        choices = {name: EngineChoice("torch", name) for name in DTYPES}
        if precision not in choices:
            raise ConfigError(f"{precision!r} is no precision.", f"Choose one of {', '.join(DTYPES)}.")
        _scores("Zero-shot scores", "domain", score_base(home))
        if precision != "float32":
            other = score_base(home, choice=choices[precision])
            _scores(f"Zero-shot scores in {precision}", "domain", other)
    if family in (None, "vlm"):
        _scores("Answers", "kind of question", score_vlm(load_vlm_base(home, SHIPPED_VLM)))


def _show(base: ClipBase | VlmBase) -> None:
    typer.echo(f"{base.name} {base.digest[:12]} in {base.directory}")


def _registered(home: Path, family: Family | None) -> list[Any]:
    """Every base of a family, CLIPs first."""
    from serving.engines.clip_base import list_bases as registered
    from serving.engines.clip_base import load_base
    from serving.engines.vlm.vlm_base import load_vlm_base

    clips = [load_base(home, name) for name in registered(home, "clip") if family != "vlm"]
    vlms = [load_vlm_base(home, name) for name in registered(home, "vlm") if family != "clip"]
    return [*clips, *vlms]


def _model(base: Any) -> str:
    if base.family == "vlm":
        return str(base.architecture)
    return f"dimension {base.dim}, images of {base.preprocess.size} px"


def _scores(title: str, first: str, scores: dict[str, dict[str, float]]) -> None:
    table = Table(first, "metric", "score", title=title)
    for row, figures in scores.items():
        for metric, value in figures.items():
            table.add_row(row, metric, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
