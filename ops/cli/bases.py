"""``ratchet base``: the frozen checkpoints, and upgrading the CLIP's to another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import ConfigError
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, Reason, show_facts, show_json, show_rows
from ratchet_client.models import Family

if TYPE_CHECKING:
    from core.ledger import UpdateRow, VerdictRow

app = typer.Typer(help="Frozen base checkpoints that adapters are trained against.", no_args_is_help=True)

FamilyOption = Annotated[Family | None, typer.Option("--family", help="Only this one; both otherwise.")]
_NAMES = Annotated[list[str], typer.Argument(help="Names of bases.")]
_NAME = Annotated[str, typer.Argument(help="Name of a registered CLIP base (`ratchet base list`).")]


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
        typer.echo(line(add_base(home, name, model=model, weights=weights)))
    elif weights is not None:
        raise ConfigError("--weights is for a CLIP.", "Put the weights into the VLM's folder and name that: --model.")
    else:
        typer.echo(line(add_vlm(home, name, model)))


@app.command("list")
def list_bases(context: typer.Context, family: FamilyOption = None, as_json: AsJson = False) -> None:
    """The registered bases, and which of them the settings name."""
    settings = ctx.of(context).settings
    rows = (
        {"name": base.name, "family": base.family, "digest": base.digest[:12], "model": _model(base),
         "in use": base.name in (settings.base.clip, settings.base.vlm)}
        for base in _registered(settings.home, family)
    )  # fmt: skip
    show_rows(rows, "Bases", as_json)


@app.command()
def show(context: typer.Context, names: _NAMES, as_json: AsJson = False) -> None:
    """Show a base: its files' digest, where it came from, which layers can carry LoRA.

    Example:  ratchet base show shipped-vlm
    """
    bases = {base.name: base for base in _registered(ctx.of(context).settings.home, None)}
    shown = {}
    for name in names:
        if name not in bases:
            raise ConfigError(f"there is no base {name!r}.", f"Registered: {', '.join(bases) or 'none'}.")
        base = bases[name]
        facts = {"family": base.family, "digest": base.digest, "folder": str(base.directory), "model": _model(base)}
        layers = {f"LoRA in {part}": pattern for part, pattern in base.lora_targets.items()}
        shown[name] = {**facts, **{what: str(value) for what, value in base.about.items()}, **layers}
    if as_json:
        show_json(shown)
        return
    for name, facts in shown.items():
        show_facts(facts, f"Base {name}")


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


@app.command()
def upgrade(
    context: typer.Context,
    name: _NAME,
    budget: Annotated[
        float | None,
        typer.Option(help="MAF-GFLOPs that the replay may spend, apart from the updates' budget; by default a day's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and record nothing.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Drop the upgrade that is under way or waits.")] = False,
) -> None:
    """Learn everything that was learned again on another CLIP base, and judge it against what is live.

    What passes is released by `ratchet base switch NAME`. A stopped upgrade goes on from its checkpoint; where an
    updater runs, that one does the work.

    Examples:  ratchet base upgrade b16 --dry-run    |    ratchet base upgrade b16 --budget 400000    |
    ratchet base upgrade b16 --cancel
    """
    settings = ctx.installed(context)
    from core.ledger.learning import FINISHED
    from updater.service.base_upgrade import begin_upgrade, begun, cancel_upgrade, finish_upgrade, plan_upgrade
    from updater.service.process import UpdaterBusy

    if cancel:
        typer.echo(f"{cancel_upgrade(settings, name).id} is dropped")
        return
    update = begun(settings, name)
    if update is None or dry_run:
        plan = plan_upgrade(settings, name, budget)
        show_facts(dict(plan.rows()), f"Upgrade to {name}")
        if dry_run:
            return
        update = begin_upgrade(settings, plan, ctx.person())
    elif budget is not None:
        raise ConfigError(f"{update.id} has a budget already.", "Leave --budget out, or drop the upgrade: --cancel.")
    typer.echo(f"{update.id} is recorded ({update.state})")
    try:
        update, verdict = finish_upgrade(settings, update.id)
    except UpdaterBusy:
        typer.echo("the updater that runs here does it next: see `ratchet status`")
        return
    if update.state not in FINISHED:  # it was asked to stop
        return
    tell_outcome(update, verdict)
    typer.echo(f"release it with `ratchet base switch {name} --reason ...`")


@app.command()
def switch(context: typer.Context, name: _NAME, reason: Reason) -> None:
    """Release the upgrade to a base that passed the gate; or go back to the base that was live before.

    Servers answer with the newest release of their own base: start them again with base.clip=NAME, one after the other.

    Examples:  ratchet base switch b16 --reason "better on all domains"    |
    ratchet base switch shipped --reason "searches are worse"
    """
    settings = ctx.installed(context)
    from updater.service.base_upgrade import switch_base

    row = switch_base(settings, name, actor=ctx.person(), reason=reason)
    typer.echo(f"release {row.number} is in the ledger: clip {row.clip or 'base'} on the base {name}")
    typer.echo(f"now set base.clip to {name!r}, and start servers and updater again; until then the old base answers")


def tell_outcome(update: UpdateRow, verdict: VerdictRow | None) -> None:
    """Print the gate's outcome and the update's error. Raises typer.Exit(1) unless the finished update passed."""
    reasons = f": {'; '.join(map(str, verdict.summary.get('reasons', [])))}" if verdict else ""
    error = f" ({update.error})" if update.error else ""
    typer.echo(f"{verdict.outcome if verdict else update.state}{reasons}{error}")
    if verdict is None or verdict.outcome != "passed" or update.state != "done":
        raise typer.Exit(1)


def line(base: Any) -> str:
    return f"{base.name} {base.digest[:12]} in {base.directory}"


def _registered(home: Path, family: Family | None) -> list[Any]:
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
