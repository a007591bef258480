"""``ratchet releases``: look at releases, take one back, hold updates."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from core.errors import ReleaseError
from core.ledger import Family, Ledger, ProposalRow, answers
from core.progress import say
from core.settings import Settings
from ops.cli import context as ctx
from ops.cli.audit import lines
from ops.cli.cells import printable
from ops.cli.model_server import ServerOption, operator_client

app = typer.Typer(help="List, show, roll back, hold and resume releases.", no_args_is_help=True)


Reason = Annotated[str, typer.Option("--reason", "-r", prompt="Reason", help="Why; kept in the audit log.")]


@app.command("list")
def list_releases(context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=1000)] = 20) -> None:
    """Releases, newest first, with the base of their CLIP, and proposals that failed or wait.

    Example:  ratchet releases list --limit 5
    """
    from serving.engines.clip_base import names_by_digest
    from serving.releases.leadership import clip_bases

    settings = ctx.of(context).settings
    ledger = Ledger.open(settings.ledger)
    table = Table(
        "", "release", "answers", Column("adapters", no_wrap=True), "CLIP base", "who", "when (UTC)", "why",
        title="Releases",
    )  # fmt: skip
    rows, stable = ledger.releases(limit), ledger.stable()
    bases = clip_bases(rows, names_by_digest(settings.home), settings.base.clip)
    collected = ledger.collected([name for row in rows for name in (row.clip, row.vlm)])
    for index, row in enumerate(rows):
        when = f"{row.created_at:%Y-%m-%d %H:%M:%S}"
        mark = "[green]live[/green]" if index == 0 else ""
        if stable is not None and index and row.number == stable.number:
            mark = "[green]stable[/green]"
        if any(name in collected for name in (row.clip, row.vlm)):
            mark = "[dim]collected[/dim]"
        table.add_row(
            mark, str(row.number), answers(row.share), adapters(row.clip, row.vlm), Text(bases[row.number]),
            Text(row.actor), when, Text(row.reason),
        )  # fmt: skip
    Console().print(table)
    open_or_failed = [p for p in ledger.proposals(limit) if p.state != "committed"]
    if open_or_failed:
        table = Table("proposal", "kind", "state", "sets", "who", "why", "error", title="Proposals not released")
        for row_ in open_or_failed:
            cells = (str(row_.id), row_.kind, row_.state, _sets(row_), row_.actor, row_.reason, row_.error or "")
            table.add_row(*map(Text, cells))
        Console().print(table)
    held = ledger.held()
    if held is not None:
        Console().print(
            "[yellow]updates are on hold[/yellow] by "
            + escape(f"{held.actor} since {held.created_at:%Y-%m-%d %H:%M} UTC: {held.reason}")
        )


@app.command()
def show(context: typer.Context, number: Annotated[int, typer.Argument(help="Release number.")]) -> None:
    """Everything about one release: data range, recipe, cost, verdict, actor and reason.

    Example:  ratchet releases show 3
    """
    from updater.gate.verdict import diagnostics_lines

    ledger = Ledger.open(ctx.of(context).settings.ledger)
    release = ledger.release(number)
    facts: dict[str, Any] = {
        "release": release.number, "clip": release.clip or "base", "vlm": release.vlm or "base",
        "answers": answers(release.share), "actor": release.actor, "reason": release.reason,
        "at": f"{release.created_at:%Y-%m-%d %H:%M:%S} UTC",
    }  # fmt: skip
    for name, why in ledger.withdrawn([release.clip, release.vlm]).items():
        facts[f"{name} was withdrawn"] = why
    for name, time in ledger.collected([release.clip, release.vlm]).items():
        facts[f"{name} was collected"] = f"{time:%Y-%m-%d %H:%M} UTC: no rollback goes back to it"
    if release.proposal_id is not None and ledger.proposal(release.proposal_id).forced:
        facts["forced"] = "no gate had passed it"
    updates = {update.adapter: update for update in reversed(ledger.updates(1000)) if update.adapter is not None}
    for family in ("clip", "vlm"):
        update = updates.get(getattr(release, family))
        if update is None:
            continue
        verdict = ledger.verdict_of(update.id)
        summary = {
            "trained by update": update.id, "recipe": update.recipe.get("name", ""), "seed": update.seed,
            "data from": update.data_from, "data to": update.data_to, "store version": update.store_version,
            "cost": lines(update.cost), "verdict": verdict.outcome if verdict else "none",
            "report": verdict.report_key if verdict else "none",
        }  # fmt: skip
        if verdict is not None and (beside := "\n".join(diagnostics_lines(verdict.summary.get("diagnostics") or {}))):
            summary["beside the verdict"] = printable(beside)
        facts |= {f"{family}: {name}": value for name, value in summary.items()}
    table = Table(show_header=False, title=f"Release {number}")
    for name, value in facts.items():
        table.add_row(name, Text(str(value)))
    Console().print(table)


@app.command()
def rollback(
    context: typer.Context,
    reason: Reason,
    to: Annotated[
        int | None, typer.Option(help="Release to go back to; the one before the live one by default.")
    ] = None,
    family: Annotated[
        Family | None, typer.Option(help="Only this adapter goes back; the other stays what is live.")
    ] = None,
    expected_live: Annotated[int | None, typer.Option(help="Refuse if another release is live by now.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Write it into the ledger without asking the server, which follows.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Go back to an older release, as a new release; replicas that do not answer at once follow by themselves.

    Examples:  ratchet releases rollback -r "wrong colours"    |    ratchet releases rollback --family vlm -r "vague"
    |    ratchet releases rollback --offline --to 3 -r "no server starts with release 4"
    """
    settings = ctx.of(context).calling(server)
    if offline:
        _roll_back_offline(settings, reason, to, family, expected_live)
        return
    with operator_client(settings) as client:
        _tell(client.rollback(reason, to=to, expected_live=expected_live, family=family))
    _say_held(settings)


@app.command()
def release(
    context: typer.Context,
    reason: Reason,
    clip: Annotated[str | None, typer.Option(help="CLIP adapter to serve, or 'base'; what is live if unset.")] = None,
    vlm: Annotated[str | None, typer.Option(help="VLM adapter to serve, or 'base'; what is live if unset.")] = None,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="A canary for this share of the requests; 1: everybody.")
    ] = 1.0,
    shadow: Annotated[bool, typer.Option("--shadow", help="Answer no client: only compare with what is live.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also what no gate passed and was never live; the audit log says so.")
    ] = False,
    expected_live: Annotated[int | None, typer.Option(help="Refuse if another release is live by now.")] = None,
    server: ServerOption = None,
) -> None:
    """Release adapters by name, e.g. to roll forward again; returns when every replica serves them.

    Examples:  ratchet releases release --clip clip-0123456789ab -r "right after all"    |    ... --vlm base -r "why"
    |    ... --share 0.1 -r "a tenth first"    |    ... --shadow -r "only look"
    """
    named: dict[str, Any] = {family: name for family, name in (("clip", clip), ("vlm", vlm)) if name is not None}
    if not named:
        raise ReleaseError("no adapter is named.", "Give --clip, --vlm, or both.")
    if shadow and share not in (0.0, 1.0):
        raise ReleaseError("a shadow has no share.", "Give either --shadow or --share.")
    how: dict[str, Any] = {"share": 0.0 if shadow else share, "force": force}
    with operator_client(ctx.of(context).calling(server)) as client:
        _tell(client.release(reason=reason, expected_live=expected_live, **named, **how))


@app.command()
def promote(
    context: typer.Context,
    reason: Reason,
    expected_live: Annotated[int | None, typer.Option(help="Refuse if another release is live by now.")] = None,
    server: ServerOption = None,
) -> None:
    """Let the canary or shadow that is live answer everybody, as a new release.

    Example:  ratchet releases promote -r "a day without complaints"
    """
    with operator_client(ctx.of(context).calling(server)) as client:
        _tell(client.promote(reason, expected_live=expected_live))


@app.command()
def hold(context: typer.Context, reason: Reason, server: ServerOption = None) -> None:
    """Let updates wait: what passes the gate is not released until `resume`."""
    with operator_client(ctx.of(context).calling(server)) as client:
        client.hold(reason)
    typer.echo("updates are on hold")


@app.command()
def resume(context: typer.Context, reason: Reason, server: ServerOption = None) -> None:
    """End a hold."""
    with operator_client(ctx.of(context).calling(server)) as client:
        client.resume(reason)
    typer.echo("updates go on")


def adapters(clip: str | None, vlm: str | None) -> Text:
    """The names of both, one below the other, so that they are whole in a narrow terminal too."""
    return Text(f"{clip or 'clip: base'}\n{vlm or 'vlm: base'}")


def _sets(row: ProposalRow) -> str:
    named = {"clip": row.clip or "base", "vlm": row.vlm or "base"}
    return " + ".join(f"{family} {name}" for family, name in named.items() if row.family in (family, "both"))


def _roll_back_offline(
    settings: Settings, reason: str, to: int | None, family: Family | None, expected_live: int | None
) -> None:
    from serving.app import serves_vlm
    from serving.releases.rollback import roll_back_offline

    served: list[Family] = ["clip", "vlm"] if serves_vlm(settings) else ["clip"]
    families: list[Family] = served if family is None else [family]
    row = roll_back_offline(
        Ledger.open(settings.ledger), families, to=to, actor=ctx.person(), reason=reason, expected_live=expected_live,
        hold_after_rollback=settings.rollout.hold_after_rollback,
    )  # fmt: skip
    typer.echo(
        f"release {row.number} is in the ledger: clip {row.clip or 'base'} vlm {row.vlm or 'base'}; "
        "servers adopt it within seconds of reading the ledger"
    )
    _say_held(settings)


def _say_held(settings: Settings) -> None:
    if settings.rollout.hold_after_rollback:
        say("updates wait until `ratchet releases resume`")


def _tell(result: dict[str, Any]) -> None:
    seconds = {name: value for name, value in result.items() if name.endswith("seconds")}
    trial = f" ({answers(result['share'])})" if result["share"] < 1 else ""
    typer.echo(
        f"release {result['number']}{trial} is live everywhere: "
        f"clip {result.get('clip') or 'base'} vlm {result.get('vlm') or 'base'} "
        + " ".join(f"{name}={value:.3f}" for name, value in seconds.items())
    )
