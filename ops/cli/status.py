"""``ratchet status``: the state of an installation at a glance."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.dependencies import Dependency, DependencyState, dependency_of
from core.errors import RatchetError
from ops.cli import context as ctx
from ops.cli.context import ServerOption, operator_client
from ops.cli.releases import adapters
from ops.cli.terminal import COLOURS, AsJson, show_json, table_of

if TYPE_CHECKING:
    from core.ledger import UpdateRow, VerdictRow
    from core.settings import Settings
    from ops.cli.supervisor import Supervisor
    from ops.stream_state import StreamState

FACTS_SECONDS = 20.0
LOOKED_SECONDS = 10.0
_looked: list[tuple[Settings, float, dict[Dependency, DependencyState]]] = []


def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
    server: ServerOption = None,
) -> None:
    """Is it healthy, what is live, is it learning, what does it cost.

    Examples:  ratchet status    |    ratchet status --watch    |    ratchet status --json
    """
    settings = ctx.of(context).calling(server)
    if settings.server_url is None:
        ctx.installed(context)
    if as_json:
        show_json(
            {name: value for name, value in collect(settings).items() if name != "stream"}
        )  # its fields are there
        return
    console = Console()
    if not watch:
        console.print(screen(settings))
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(screen(settings), refresh=True)
            time.sleep(1)


def collect(settings: Settings) -> dict[str, Any]:
    """The data of the screen, without what needs an unhealthy dependency or takes longer than :data:`FACTS_SECONDS`."""
    from serving.own_threads import BoundedCall

    dependencies = _dependencies(settings)
    facts: dict[str, Any] = {
        "dependencies": {name: asdict(found) for name, found in dependencies.items()},
        "budget_capacity": settings.budget.gflops_per_day,
        "health": _health(settings),
        **_controller(settings),
    }
    parts: dict[Dependency, Callable[[Settings], dict[str, Any]]] = {"ledger": _ledger_facts, "store": _stream_facts}
    for name, make in parts.items() if settings.has_ledger else ():
        if dependencies["ledger"].state == dependencies[name].state == "ok":
            try:
                facts |= BoundedCall(partial(make, settings), FACTS_SECONDS)()
            except TimeoutError as error:
                facts["dependencies"][name] = asdict(DependencyState("slow", f"{error}."))
            except RatchetError as error:
                facts["dependencies"][dependency_of(error) or name] = asdict(DependencyState.of(error))
    return facts


def _ledger_facts(settings: Settings) -> dict[str, Any]:
    from core.ledger import Ledger

    capacity = settings.budget.gflops_per_day
    counts = ("pending", "visited", "passed_over")  # of new samples: all, those in a batch, the others
    with closing(Ledger.open(settings.ledger)) as ledger:
        updates = ledger.updates(5)
        return {
            "live": ledger.live(),
            "releases": ledger.releases(5),
            "held": ledger.held(),
            "updates": [(update, ledger.verdict_of(update.id)) for update in updates],
            "visits": {each.id: {name: each.cost.get(name) for name in counts} for each in updates},
            "proposals": ledger.pending_proposals(),
            "budget_level": ledger.bucket_level(time.time(), capacity / 86400, capacity),
            "stable": ledger.stable(),
            "approved_upgrade": ledger.approved_upgrade(),
        }


def _stream_facts(settings: Settings) -> dict[str, Any]:
    from core.ledger import Ledger
    from ops.stream_state import stream_state
    from streams.store.sample_store import SampleStore
    from updater.service.learning_state import learning_states

    store = SampleStore(settings.lake)
    with closing(Ledger.open(settings.ledger)) as ledger:
        stream = stream_state(settings, store, ledger)
        learning = {family: state.to_json() for family, state in learning_states(settings, ledger, store).items()}
        return {**asdict(stream), "stream": stream, "learning": learning}


def _dependencies(settings: Settings) -> dict[Dependency, DependencyState]:
    """Cached for :data:`LOOKED_SECONDS`: the screen is drawn every second."""
    from ops.dependency_checks import look

    if not _looked or _looked[0][0] is not settings or time.monotonic() - _looked[0][1] > LOOKED_SECONDS:
        _looked[:] = [(settings, time.monotonic(), look(settings))]
    return dict(_looked[0][2])


def screen(settings: Settings, parts: Supervisor | None = None) -> RenderableType:
    facts = collect(settings)
    top = [_serving(facts), *(panel(facts) for panel in (_stream, _learning) if "stream" in facts)]
    if parts is not None:
        top.append(_parts(parts))
    title = Text.assemble(("Ratchet ", "bold"), (f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "dim"))
    tables = [_updates(facts), _releases(facts)] if "live" in facts else []
    return Group(
        title,
        dependency_lines(facts["dependencies"]),
        *audit_lines(facts.get("learning", {})),
        Columns(top, equal=True, expand=True),
        *tables,
    )


def dependency_lines(dependencies: dict[str, dict[str, str]]) -> Text:
    well = [name for name, found in dependencies.items() if found["state"] == "ok"]
    lines = [Text(f"{', '.join(well)}: ok", "dim")] if well else []
    lines += [
        Text.assemble((f"{name}: {found['state']}. ", "bold red"), f"{found['detail']} {found['fix']}")
        for name, found in dependencies.items()
        if found["state"] != "ok"
    ]
    return Text("\n").join(lines)


def _health(settings: Settings) -> dict[str, Any]:
    import httpx

    try:
        response = httpx.get(f"{settings.server}/health/ready", timeout=2, trust_env=False)
        return {"ready": response.status_code == 200, **response.json()}
    except (httpx.HTTPError, ValueError) as error:
        return {"ready": False, "reason": type(error).__name__}


def _controller(settings: Settings) -> dict[str, Any]:
    """State of the controller. ``vlm``: its base and replicas. ``replicas``: by deployment and state. ``rollout``:
    watched by the guard. ``trouble``: why the controller cannot work or be asked. ``catalog``: each image space's rows,
    backfill and index; None while the server does not answer."""
    from ratchet_client import ServerError
    from serving.engines.clip_base import list_bases

    registered = settings.base.vlm in list_bases(settings.home, "vlm")
    vlm = {"base": settings.base.vlm, "registered": registered, "replicas": [], "problem": ""}
    facts: dict[str, Any] = {
        "vlm": vlm, "replicas": {}, "rollout": {"state": "unknown"}, "waits_for": [], "catalog": None, "trouble": "",
    }  # fmt: skip
    try:
        with operator_client(settings, timeout=3.0) as client:
            status = client.status()
    except RatchetError as error:
        if not (isinstance(error, ServerError) and error.status == 0):  # an unreachable server shows in health
            facts["trouble"] = f"{error.message} {error.fix}".strip()
        return facts
    controller = status["controller"]
    vlm |= {"replicas": controller["vlm"], "problem": status.get("vlm_problem", "")}
    facts |= {name: controller[name] for name in ("replicas", "rollout", "trouble")}
    facts["waits_for"] = controller.get("waits_for", [])  # a server from before
    return {**facts, "catalog": status["catalog"]}


def replica_lines(replicas: dict[str, dict[str, int]]) -> str:
    return "".join(
        f"{name}: {', '.join(f'{count} {state.lower()}' for state, count in sorted(states.items()))}\n"
        for name, states in sorted(replicas.items())
        if set(states) != {"RUNNING"}
    )


def rollout_line(rollout: dict[str, Any]) -> str:
    """The release that the guard watches, in one line; empty if there is none."""
    if "release" not in rollout:
        return ""
    what = {"guard": "guard watches", "shadow": "shadow"}.get(rollout["state"], f"canary {rollout['share']:.0%}")
    agree = ", ".join(
        f"{family} agrees on {seen['agreed']} of {seen['inputs']}"
        for family, seen in sorted(rollout["compared"].items())
    )
    left = "" if rollout["seconds_left"] is None else f", {rollout['seconds_left']:.0f} s left"
    return f"{what} release {rollout['release']} against {rollout['incumbent']}: {agree}{left}\n"


def catalog_lines(catalog: dict[str, Any] | None) -> str:
    if catalog is None:
        return ""
    lines = f"catalog: {catalog['corpus_rows']:,} samples, {catalog['coverage']:.1%} searchable everywhere\n"
    for name, space in sorted(catalog["spaces"].items()):
        if space["missing"]:
            left = space["seconds_left"]
            estimate = "no estimate yet" if left is None else f"{timedelta(seconds=round(left))} left"
            rate = f"{space['rows_per_second']:.0f} rows/s"
            lines += f"  {name[:12]} is embedded: {space['coverage']:.1%}, {rate}, {estimate}\n"
        if space["index"]["building"]:
            lines += f"  {name[:12]}: its index is being made\n"
    return lines


def _vlm_line(vlm: dict[str, Any]) -> str:
    if not vlm["base"]:
        return "no VLM (base.vlm is empty)\n"
    if not vlm["registered"]:
        return f"no VLM: base {vlm['base']} is not registered\n"
    if not vlm["replicas"]:
        return f"vlm {vlm['base']}: {vlm['problem'] or 'no replica answers'}\n"
    engines = ", ".join(sorted({replica["engine"] for replica in vlm["replicas"]}))
    running = sum(replica["running"] for replica in vlm["replicas"])
    adapters = sorted({name for replica in vlm["replicas"] for name in replica["resident"]})
    return f"vlm {vlm['base']} on {engines}: {running} running, holds {', '.join(adapters) or 'the base alone'}\n"


def _serving(facts: dict[str, Any]) -> Panel:
    live, ready = facts.get("live"), facts["health"]["ready"]
    lines = Text()
    lines.append("ready\n" if ready else "not ready\n", "bold green" if ready else "bold red")
    if live:
        lines.append(f"release {live.number}: clip {live.clip or 'base'}, vlm {live.vlm or 'base'}\n")
    elif "live" in facts:
        lines.append("no release yet\n")
    if live and not live.plain and facts["stable"]:
        stable = facts["stable"]
        lines.append(f"release {stable.number} answers the rest: clip {stable.clip or 'base'}, ", "yellow")
        lines.append(f"vlm {stable.vlm or 'base'}\n", "yellow")
    lines.append(rollout_line(facts["rollout"]), "cyan")
    lines.append("".join(f"a release waits for index {each}\n" for each in facts["waits_for"]), "yellow")
    lines.append(_vlm_line(facts["vlm"]))
    lines.append(replica_lines(facts["replicas"]), "yellow")
    lines.append(f"{facts['trouble']}\n" if facts["trouble"] else "", "yellow")
    lines.append(catalog_lines(facts["catalog"]))
    if held := facts.get("held"):
        lines.append(f"on hold by {held.actor}: {held.reason}\n", "yellow")
    if "proposals" in facts:
        lines.append(f"{len(facts['proposals'])} proposals waiting")
    return Panel(lines, title="serving", border_style="green" if ready else "red")


def _stream(facts: dict[str, Any]) -> Panel:
    stream: StreamState = facts["stream"]
    lines = Text()
    lines.append(f"{stream.samples['train']:,} to train on\n{stream.samples['fresh_eval']:,} for the gate\n")
    if stream.held:
        lines.append(f"{stream.held:,} held: ratchet trust list\n", "yellow")
    lines.append(f"{stream.records:,} records read, {stream.fragments} fragments\n")
    if stream.lost:
        last = f", last: {stream.gaps[0].shown}" if stream.gaps else ""
        lines.append(f"{stream.lost:,} offsets lost{last}\n", "red")
    if stream.rewritten:
        lines.append(f"{stream.rewritten:,} offsets rewritten by the broker after they were stored\n", "yellow")
    if stream.waiting_for is None:
        lines.append("ingest: no metrics here\n", "dim")
    elif stream.waiting_for:
        lines.append(f"ingest waits for the {stream.waiting_for}: {stream.waiting_state}\n", "yellow")
    if stream.quarantine_failing:
        lines.append("refused records cannot be published; the log of ingest says why\n", "yellow")
    lines.append(*maintenance_line(stream))
    if stream.deletions:
        hours = stream.oldest_deletion.total_seconds() / 3600
        lines.append(f"\ndeletions waiting: {stream.deletions}, the oldest for {hours:.1f} h", "yellow")
    return Panel(lines, title="stream", border_style="red" if stream.problems() else "")


def maintenance_line(stream: StreamState) -> tuple[str, str]:
    if stream.maintained is None:
        if stream.maintenance_failing:
            return "maintenance fails", "red"
        return "no maintenance yet" if stream.maintenance_known else "maintenance: no metrics here", "dim"
    seconds = (datetime.now(UTC) - stream.maintained).total_seconds()
    since = f"maintained {seconds:,.0f} s ago"
    return (f"{since}, failing since", "red") if stream.maintenance_failing else (since, "")


def _learning(facts: dict[str, Any]) -> Panel:
    share = facts["budget_level"] / facts["budget_capacity"]
    bar = "█" * max(0, round(share * 20))
    running = [update for update, _ in facts["updates"] if update.state in ("training", "trained", "gated")]
    state = f"update {running[0].id[:12]} {running[0].state}" if running else "waiting for data or budget"
    if not running and (upgrade := facts["approved_upgrade"]) is not None:
        state = f"base {upgrade.new_name} passed the gate: ratchet base switch {upgrade.new_name}"
    lines = [state, f"budget {bar:<20} {share:.0%}", f"{facts['budget_level']:,.0f} MAF-GFLOPs left"]
    lines += [learning_line(family, state) for family, state in facts["learning"].items()]
    return Panel(Text("\n".join(lines)), title="learning")


def audit_lines(learning: dict[str, dict[str, Any]]) -> list[Text]:
    """A line for each family whose live adapter failed its audit."""
    failed = ((family, state["audits"]["failed"]) for family, state in learning.items())
    return [
        Text.assemble(
            (f"{family}: the audit of release {audit['release']} failed, and it is live: ", "bold red"),
            f"{audit['reason']}. {audit['advice']}",
        )
        for family, audit in failed
        if audit is not None
    ]


def learning_line(family: str, state: dict[str, Any]) -> str:
    line = f"{family}: {state['fresh_items']:,} of {state['fresh_items_needed']:,} fresh items"
    if state["lacks"]:
        line += f"\n  nothing is trained: {state['lacks']}"
    left = state["alpha"] - state["alpha_spent"]
    spent = f"{state['alpha_spent']:.2g} spent on gains since the last release"
    line += f"\n  alpha {state['alpha']:g}: {spent}, {left:.2g} left"
    if (candidate := state["kept"]) is not None:
        items = f"{candidate['asked_again_with']:,} fresh items"
        line += f"\n  {candidate['adapter']}: {candidate['looks']} looks, the next with {items}"
    audits = state["audits"]
    line += f"\n  audit: {audits['releases']} of {audits['every']} releases since the last one"
    if (newest := audits["newest"]) is not None:
        outcome = "passed" if newest["passed"] else "failed"
        line += f"\n  release {newest['release']} {outcome} it: {newest['reasons'][0]}"
    return f"{line}\n  retention items used for {audits['used']} judgements"


def _parts(parts: Supervisor) -> Panel:
    lines = Text()
    for part in parts.parts:
        lines.append(f"{part.name:8}", "bold")
        lines.append("up" if part.running else "down", "green" if part.running else "red")
        lines.append(f"  {part.restarts} restarts\n" if part.restarts else "\n")
    return Panel(lines, title="parts")


def _updates(facts: dict[str, Any]) -> Table:
    rows = [
        {
            "update, adapter": f"{update.id}\n{update.adapter or '-'}", "recipe": update.recipe.get("name", ""),
            "state": update.state, "verdict": _outcome(verdict), "MAF-GFLOPs": _spent(update),
            "visited": update.cost.get("visited", 0), "passed over": update.cost.get("passed_over", 0),
            "began (UTC)": f"{update.created_at:%m-%d %H:%M} {update.cost.get('trigger', '')}",
        }
        for update, verdict in facts["updates"]
    ]  # fmt: skip
    return table_of(rows, "Updates", whole=["update, adapter"])


def _outcome(verdict: VerdictRow | None) -> Text:
    if verdict is None:
        return Text("-")
    look, spent = verdict.summary.get("look"), ""
    if look is not None and look["made"]:
        spent = f"\nlook {look['number']}: {look['spent']:.2g} of {look['alpha']:.2g} spent"
    elif look is not None:
        spent = "\nno look: nothing spent"
    return Text(f"{verdict.outcome}{spent}", COLOURS.get(verdict.outcome, ""))


def _spent(update: UpdateRow) -> str:
    """Compute spent; none for further looks, which train nothing."""
    return "-" if "trained_by" in update.cost else f"{update.cost.get('gflops_spent', 0):,.0f}"


def _releases(facts: dict[str, Any]) -> Table:
    from core.ledger import answers

    rows = [
        {"release": row.number, "answers": answers(row.share), "adapters": adapters(row.clip, row.vlm),
         "who": row.actor, "why": row.reason, "when (UTC)": f"{row.created_at:%m-%d %H:%M:%S}"}
        for row in facts["releases"]
    ]  # fmt: skip
    return table_of(rows, "Releases", whole=["adapters"])
