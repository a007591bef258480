"""``ratchet ingest``: the consumer, and what an operator can do about a partition."""

from __future__ import annotations

from typing import Annotated

import typer

from ops.cli import context as ctx

app = typer.Typer()


@app.callback(invoke_without_command=True)
def ingest(context: typer.Context) -> None:
    """Read the Kafka topic into the sample store, until SIGTERM; or, with a command, look after a partition.

    Example:  ratchet --set kafka.bootstrap=kafka-1:9092 ingest
    """
    if context.invoked_subcommand is None:
        from streams.ingest.consumer import run_ingest

        run_ingest(ctx.of(context).settings)


@app.command()
def skip(
    context: typer.Context,
    partition: Annotated[str, typer.Argument(metavar="TOPIC:PARTITION", help="Which partition.")],
    to: Annotated[int, typer.Option("--to", min=1, help="The next offset to read; at most the end of the log.")],
    reason: Annotated[str, typer.Option("--reason", "-r", prompt="Reason", help="Why; kept in the audit log.")],
) -> None:
    """Go on with a partition at another offset. What lies before it is recorded as lost, and is not read any more.

    A running worker goes on there with its next commit. Refused: going backwards, or beyond the end of the log.

    Example:  ratchet ingest skip ratchet.samples:0 --to 4711 --reason "a burst of test records"
    """
    from core.ledger import Ledger
    from streams.ingest.resubmit import skip as skip_offsets

    settings = ctx.of(context).settings
    skipped = skip_offsets(settings, Ledger.open(settings.ledger), partition, to, actor=ctx.person(), reason=reason)
    count = skipped.until - skipped.start
    typer.echo(f"{skipped.stream}:{skipped.partition} goes on at {skipped.until}; {count} offsets are skipped")
