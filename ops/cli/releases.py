"""``ratchet releases``: list, show, create and roll back releases, and hold updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import ReleaseError
from core.progress import progress_log
from ops.cli import context as ctx
from ops.cli.context import ServerOption, operator_client
from ops.cli.terminal import AsJson, ExpectedLive, Reason, facts_text, show_facts, show_json, show_rows
from ratchet_client.models import Family

if TYPE_CHECKING:
    from core.ledger import ProposalRow

app = typer.Typer(help="List, show, create, roll back, hold and resume releases.", no_args_is_help=True)


@app.command("list")
def list_releases(
    context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=1000)] = 20, as_json: AsJson = False
) -> None:
    """Releases, newest first, with the base of their CLIP, and proposals that failed or wait. Times are in UTC.

    Example:  ratchet releases list --limit 5
    """
    from core.ledger import answers
    from serving.engines.clip_base import names_by_digest
    from serving.releases.leadership import clip_bases

    settings, ledger = ctx.of(context).settings, ctx.ledger_of(context)
    rows, stable, held = ledger.releases(limit), ledger.stable(), ledger.held()
    bases = clip_bases(rows, names_by_digest(settings.home), settings.base.clip)
    collected = ledger.collected([name for row in rows for name in (row.clip, row.vlm)])

    def state(index: int) -> str:
        row = rows[index]
        if any(name in collected for name in (row.clip, row.vlm)):
            return "collected"
        if index == 0:
            return "live"
        return "stable" if stable is not None and row.number == stable.number else ""

    releases = [
        {
            "state": state(index), "release": row.number, "answers": answers(row.share),
            "adapters": adapters(row.clip, row.vlm), "CLIP base": bases[row.number], "who": row.actor,
            "when": row.created_at, "why": row.reason,
        }
        for index, row in enumerate(rows)
    ]  # fmt: skip
    proposals = [
        {"proposal": row.id, "kind": row.kind, "state": row.state, "sets": _sets(row), "who": row.actor,
         "why": row.reason, "error": row.error}
        for row in ledger.proposals(limit) if row.state != "committed"
    ]  # fmt: skip
    if as_json:
        show_json({"releases": releases, "proposals": proposals, "held": None if held is None else held.reason})
        return
    show_rows(releases, "Releases", whole=["adapters"])
    if proposals:
        show_rows(proposals, "Proposals not released")
    if held is not None:
        typer.echo(f"updates are on hold by {held.actor} since {held.created_at:%Y-%m-%d %H:%M} UTC: {held.reason}")


@app.command()
def show(
    context: typer.Context, number: Annotated[int, typer.Argument(help="Release number.")], as_json: AsJson = False
) -> None:
    """Everything about one release: data range, recipe, cost, verdict, actor and reason.

    Example:  ratchet releases show 3
    """
    ledger = ctx.ledger_of(context)
    release = ledger.release(number)
    from core.ledger import answers
    from updater.gate.verdict import diagnostics_lines

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
            "trained by update": update.id, "recipe": update.recipe.get("name", ""), "seed": str(update.seed),
            "data from": str(update.data_from), "data to": str(update.data_to), "store version": update.store_version,
            "cost": facts_text(update.cost), "verdict": verdict.outcome if verdict else "none",
            "report": verdict.report_key if verdict else "none",
        }  # fmt: skip
        if verdict is not None and (more := "\n".join(diagnostics_lines(verdict.summary.get("diagnostics") or {}))):
            summary["diagnostics"] = more
        facts |= {f"{family}: {name}": value for name, value in summary.items()}
    show_facts(facts, f"Release {number}", as_json)


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
    expected_live: ExpectedLive = None,
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
        from serving.app import serves_vlm
        from serving.releases.rollback import roll_back_offline

        served: list[Family] = ["clip", "vlm"] if serves_vlm(settings) else ["clip"]
        row = roll_back_offline(
            ctx.ledger_of(context), served if family is None else [family], to=to, actor=ctx.person(),
            reason=reason, expected_live=expected_live, hold_after_rollback=settings.rollout.hold_after_rollback,
        )  # fmt: skip
        typer.echo(
            f"release {row.number} is in the ledger: clip {row.clip or 'base'} vlm {row.vlm or 'base'}; "
            "servers adopt it within seconds of reading the ledger"
        )
    else:
        with operator_client(settings) as client:
            _tell(client.rollback(reason, to=to, expected_live=expected_live, family=family))
    if settings.rollout.hold_after_rollback:
        progress_log.info("updates wait until `ratchet releases resume`")


@app.command()
def create(
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
    expected_live: ExpectedLive = None,
    server: ServerOption = None,
) -> None:
    """Release adapters by name, e.g. to roll forward again; returns when every replica serves them.

    Examples:  ratchet releases create --clip clip-0123456789ab -r "right after all"    |
    ratchet releases create --vlm base -r "why"    |
    ratchet releases create --clip base --share 0.1 -r "a tenth first"
    """
    named: dict[str, Any] = {family: name for family, name in (("clip", clip), ("vlm", vlm)) if name is not None}
    if not named:
        raise ReleaseError("no adapter is named.", "Give --clip, --vlm, or both.")
    if shadow and share not in (0.0, 1.0):
        raise ReleaseError("a shadow has no share.", "Give either --shadow or --share.")
    named |= {"share": 0.0 if shadow else share, "force": force}
    with operator_client(ctx.of(context).calling(server)) as client:
        _tell(client.release(reason=reason, expected_live=expected_live, **named))


@app.command()
def promote(
    context: typer.Context, reason: Reason, expected_live: ExpectedLive = None, server: ServerOption = None
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


def adapters(clip: str | None, vlm: str | None) -> str:
    """Both names on separate lines, so that narrow terminals show them whole."""
    return f"{clip or 'clip: base'}\n{vlm or 'vlm: base'}"


def _sets(row: ProposalRow) -> str:
    named = {"clip": row.clip or "base", "vlm": row.vlm or "base"}
    return " + ".join(f"{family} {name}" for family, name in named.items() if row.family in (family, "both"))


def _tell(result: dict[str, Any]) -> None:
    from core.ledger import answers

    seconds = " ".join(f"{name}={value:.3f}" for name, value in result.items() if name.endswith("seconds"))
    trial = f" ({answers(result['share'])})" if result["share"] < 1 else ""
    typer.echo(
        f"release {result['number']}{trial} is live everywhere: "
        f"clip {result.get('clip') or 'base'} vlm {result.get('vlm') or 'base'} {seconds}"
    )
