"""``ratchet gate``, ``ratchet adapters`` and ``ratchet recipes``: judge, import, export and train adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.errors import GateError
from ops.cli import context as ctx
from ops.cli.bases import tell_outcome
from ops.cli.terminal import AsJson, printable, show_rows
from ratchet_client.models import Family

gate = typer.Typer(help="Regression tests that an update must pass.", no_args_is_help=True)
adapters = typer.Typer(help="Take adapters in from PEFT directories, and write them out.", no_args_is_help=True)
recipes = typer.Typer(help="How updates are trained.", no_args_is_help=True)


@gate.command()
def run(
    context: typer.Context,
    candidate: Annotated[str, typer.Argument(help="Adapter name, e.g. clip-0123456789ab, or its directory.")],
    incumbent: Annotated[
        str | None, typer.Option(help="Adapter to compare with, or 'base'; the live one by default.")
    ] = None,
    suites: Annotated[
        list[Path] | None, typer.Option(help="Suite YAML files or folders, instead of gate.suites.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; home/gate/NAME by default.")] = None,
) -> None:
    """Judge an adapter against the incumbent and the base, and write a report. Nothing is released.

    Examples:  ratchet gate run clip-0123456789ab    |    ratchet gate run my-adapter/ --incumbent base --out report/
    """
    settings = ctx.installed(context)
    from updater.gate.gate_command import gate_command
    from updater.gate.verdict import diagnostics_lines

    verdict, page = gate_command(settings, candidate, incumbent=incumbent, suites=suites or None, out=out)
    typer.echo(f"{verdict.outcome}: {'; '.join(verdict.reasons)}\n{page}")
    for line in diagnostics_lines(verdict.summary()["diagnostics"]):
        typer.echo(printable(line))
    if verdict.outcome != "passed":
        raise typer.Exit(1)


@gate.command()
def promise(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what the gate promises here: which losses can pass how often, on which items, and how many in a year.

    Computed from the settings, the suites, the store and the ledger; nothing is judged or created.

    Example:  ratchet gate promise
    """
    from ops.cli.promise import show_promises

    show_promises(ctx.of(context).settings, as_json)


@gate.command()
def pairs(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="A retrieval suite, e.g. emoji_retrieval or fresh.fluent3d.")],
    limit: Annotated[int, typer.Option(min=1, max=150, help="Most pairs.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List images that the CLIP base cannot tell apart, though their captions differ; the most similar first.

    Example:  ratchet gate pairs emoji_retrieval
    """
    from updater.gate.gate_command import pairs_command

    listed = pairs_command(ctx.of(context).settings, suite)
    rows = (
        {
            "images": round(each.image_similarity, 3), "captions": round(each.text_similarity, 3),
            "first": f"{each.first.text[:200]}\n{each.first.name}",
            "second": f"{each.second.text[:200]}\n{each.second.name}",
        }
        for each in listed[:limit]
    )  # fmt: skip
    show_rows(rows, f"{len(listed)} pairs of {suite} (cosines by the base)", as_json)


@gate.command("calibrate")
def calibrate_live(context: typer.Context, as_json: AsJson = False) -> None:
    """Calibrate what is live: probabilities of a match for min_probability, and shorter vectors for dimensions.

    The gate does it for each candidate, and for what is live before the first update. Servers read it within a minute.

    Example:  ratchet gate calibrate
    """
    settings = ctx.installed(context)
    from updater.gate.gate_command import calibrate_command

    name, found = calibrate_command(settings)
    lengths = " or ".join(map(str, found.lengths)) or "no fewer"
    rows = (
        {
            "queries": kind, "asked": curve.queries, "pairs": curve.pairs, "matches": curve.matches,
            "calibration error": f"{curve.error:.1%} [{curve.ci_low:.1%}, {curve.ci_high:.1%}]",
            "min_probability": "allowed" if curve.bounded else "refused: the error may be too large",
        }
        for kind, curve in found.curves.items()
    )  # fmt: skip
    data = {"calibration": list(rows), "lengths": found.lengths} if as_json else None
    show_rows(rows, f"Calibration of {name}; vectors can be cut to {lengths} numbers", as_json, data=data)


@gate.command()
def report(
    context: typer.Context,
    update: Annotated[str | None, typer.Argument(help="Update id; the newest verdict by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to put it in; home/gate/UPDATE by default.")] = None,
) -> None:
    """Bring the report of an update to a local folder and print the path of its page.

    Example:  ratchet gate report
    """
    settings = ctx.installed(context)
    from updater.gate.report import fetch_report

    typer.echo(fetch_report(settings, update, out=out))


@gate.command()
def blame(
    context: typer.Context,
    update: Annotated[str, typer.Argument(metavar="UPDATE", help="A rejected update, as `ratchet status` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Show which sources a rejected update's regression comes from, the most harmful first.

    Harm is what the suites that got worse lose after a short training on that source alone. A source that stands out is
    blamed, and the update is repeated once without it (trust.retry_without).

    Example:  ratchet gate blame update-0123456789ab
    """
    from core.ledger.learning import TRIGGER

    ledger = ctx.ledger_of(context)
    verdict = ledger.verdict_of(update)
    found = verdict.summary.get("blame") if verdict is not None else None
    if not found:
        raise GateError(
            f"{update} has no ranking of sources.",
            "It has one if suites got worse, and it has learned from two sources or more: see `ratchet gate report`.",
        )
    named = f"{printable(found['source'])} is blamed" if found["source"] else "no source stands out"
    rows = [{**each, "harm": f"{each['harm']:.1%}"} for each in found["suspects"]]
    show_rows(rows, f"{found['items']} items got worse; {named}", as_json, data=found)
    began = f"blame: {update} "
    again = next((each for each in ledger.updates() if str(each.cost.get(TRIGGER)).startswith(began)), None)
    if again is not None and not as_json:
        judged = ledger.verdict_of(again.id)
        typer.echo(f"{again.id} repeats it without the source: {judged.outcome if judged else again.state}")


@gate.command()
def audit(context: typer.Context, family: Annotated[Family, typer.Option(help="The model to audit.")] = "clip") -> None:
    """Audit the live adapter on the sealed items now, before `gate.audit_every` releases. A failure holds updates.

    Compares it with the base and with the adapter of the last audit that passed. Status 1 if it failed.

    Examples:  ratchet gate audit    |    ratchet gate audit --family vlm
    """
    settings = ctx.installed(context)
    from updater.service.release_audit import audit_now

    row = audit_now(settings, family)
    if row is None:
        typer.echo(f"there is nothing to audit: no adapter of the {family.upper()} is live")
        return
    typer.echo(f"release {row.release}, {row.adapter}: {row.outcome} ({row.created_at:%Y-%m-%d %H:%M} UTC)")
    for reason in row.summary["reasons"]:
        typer.echo(printable(reason))
    if not row.passed:
        typer.echo(row.advice)
        raise typer.Exit(1)


@adapters.command("import")
def import_(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(help="Directory with adapter_config.json and adapter_model.safetensors.", metavar="DIR")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base that it was trained for; needed where no ratchet.json says so.")
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Run the gate now, in this process, instead of in the updater.")
    ] = False,
) -> None:
    """Check a LoRA adapter that was trained elsewhere, store it, and let the updater judge and propose it.

    Nothing is released that the gate does not pass. An adapter that was imported before is recognized.

    Examples:  ratchet adapters import my-adapter/ --base shipped    |    ratchet adapters import exported/ --judge
    """
    settings = ctx.installed(context)
    from updater.service.exchange import gate_import, import_adapter

    imported = import_adapter(settings, directory, actor=ctx.person(), base=base)
    update, verb = imported.update, "is known" if imported.known else "is stored"
    typer.echo(f"{update.adapter} {verb}: {update.id} ({update.state})")
    if judge:
        tell_outcome(*gate_import(settings, imported))
    elif update.state == "trained":
        typer.echo("the updater judges it next; --judge does it at once")


@adapters.command()
def export(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of an adapter, e.g. clip-0123456789ab.")],
    directory: Annotated[Path, typer.Argument(help="New directory to write.", metavar="DIR")],
) -> None:
    """Write an adapter as a PEFT directory with a model card; `import` takes it back as the same adapter.

    Example:  ratchet adapters export clip-0123456789ab colours/
    """
    settings = ctx.installed(context)
    from updater.service.exchange import export_adapter

    typer.echo(export_adapter(settings, name, directory))


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """The recipes of Ratchet and of installed packages, with the model that each trains.

    Example:  ratchet recipes list
    """
    from updater.recipes import load_recipe, recipe_names

    found = (load_recipe(name) for name in recipe_names())
    rows = ({"recipe": each.name, "family": each.family, "description": each.description} for each in found)
    show_rows(rows, "Recipes", as_json, whole=["recipe"])
