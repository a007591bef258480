"""``ratchet resubmit``: refused records, sent again."""

from __future__ import annotations

from typing import Annotated

import typer

from core.progress import meter
from ops.cli import context as ctx
from ops.cli.times import SINCE_HELP, parse_since


def resubmit(
    context: typer.Context,
    why: Annotated[str, typer.Option("--why", prompt="Why", help="Kept in the audit log.")],
    reason: Annotated[str | None, typer.Option(help="Only records refused for this reason.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Only records of this source; empty: of none that is known.")
    ] = None,
    since: Annotated[str | None, typer.Option(help=f"Refused {SINCE_HELP[0].lower()}{SINCE_HELP[1:]}")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Without any of these: all refused records.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most records, the oldest first.")] = 1000,
    per_second: Annotated[float, typer.Option(min=0.1, max=10_000, help="Most records a second.")] = 50.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and send nothing.")] = False,
) -> None:
    """Send refused records to the topic again as they came, each once, when what refused them is corrected.

    Exit status: 0 all were sent, or none was left to send; 1 it ended early (broker, store, ledger); 3 some were not.

    Examples:  ratchet resubmit --reason uri_unreachable --since 1d --why "the image server is back"    |
    ratchet resubmit --source crawler-7 --dry-run --why "raised ingest.max_pixels"
    """
    from core.ledger import Ledger
    from streams.ingest.resubmit import RefusalFilter, resubmit_many

    if (reason, source, since) == (None, None, None) and not everything:
        raise typer.BadParameter("name --reason, --source or --since, or say --all")
    settings = ctx.of(context).settings
    which = RefusalFilter(reason, source, parse_since(since), limit)
    with meter("sending again") as progress:
        report = resubmit_many(
            settings,
            Ledger.open(settings.ledger),
            which,
            actor=ctx.person(),
            reason=why,
            dry_run=dry_run,
            per_second=per_second,
            on_progress=lambda so_far: progress(lambda: f"{so_far.sent} of {so_far.chosen}"),
        )
    typer.echo(str(report))
    raise typer.Exit(report.exit_status)
