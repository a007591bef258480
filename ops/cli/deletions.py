"""``ratchet samples delete`` and ``ratchet samples deletions``."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table

from core.errors import LedgerError
from core.ledger import DeletionRow, Ledger
from core.progress import meter, say
from ops.cli import context as ctx
from ops.cli.cells import add_texts
from ops.cli.times import SINCE_HELP, parse_since

POLL_SECONDS: Final = 1.0
STATES: Final = {
    "requested": "waits for maintenance",
    "removed": "no reader finds it; waits until no file has it",
    "held": "no file of the store has it; the bucket keeps old versions of such files",
    "done": "no file has it",
}
MAX_REASON: Final = 1000


def delete(
    context: typer.Context,
    reason: Annotated[str, typer.Option(prompt="Reason", help="Kept in the audit log.")],
    sample_id: Annotated[str | None, typer.Option("--id", help="The sample with this id.")] = None,
    source: Annotated[str | None, typer.Option(help="Samples and refused records of this source.")] = None,
    domain: Annotated[str | None, typer.Option(help="Samples of this domain.")] = None,
    concept: Annotated[str | None, typer.Option(help="Samples of this concept.")] = None,
    label: Annotated[str | None, typer.Option(help="Samples with this label.")] = None,
    key: Annotated[str | None, typer.Option(help="What came with this record key: text, or hex after 0x.")] = None,
    record: Annotated[str | None, typer.Option(help="What came of this record: TOPIC:PARTITION:OFFSET.")] = None,
    before: Annotated[
        str | None, typer.Option(help=f"Only what was ingested before this time: {SINCE_HELP.partition(': ')[2]}")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much it is, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when no file of the store has it any more.")] = False,
) -> None:
    """Delete samples and refused records: all that is named has to hold. What comes in later is not affected.

    Examples:  ratchet samples delete --source crawler-7 --dry-run --reason "consent withdrawn"    |
    ratchet samples delete --key user-17 --before 30d --reason "account closed" --yes --wait
    """
    from streams.store.deletion import count_selected, request_deletion
    from streams.store.sample_store import SampleStore

    if not 0 < len(reason.strip()) <= MAX_REASON:
        raise typer.BadParameter(f"--reason has 1 to {MAX_REASON} characters")
    settings = ctx.of(context).settings
    moment = parse_since(before)
    options: dict[str, str | None] = {
        "id": sample_id, "source": source, "domain": domain, "concept": concept, "label": label,
        "key": None if key is None else _hex(key), "record": record,
        "before": None if moment is None else moment.isoformat(),
    }  # fmt: skip
    selector = {name: value for name, value in options.items() if value is not None}
    selected = count_selected(SampleStore(settings.lake), selector)
    typer.echo(f"{selected.samples:,} samples and {selected.refusals:,} refused records are selected.")
    if dry_run:
        return
    if not yes:
        typer.confirm("Delete them? This cannot be undone", abort=True)
    ledger = Ledger.open(settings.ledger)
    row = request_deletion(ledger, selector, actor=ctx.person(), reason=reason.strip())
    if wait:
        _print_receipt(_follow(ledger, row.id))
    else:
        typer.echo(f"{row.id} is requested. See `ratchet samples deletions {row.id}`.")


def list_deletions(
    context: typer.Context,
    deletion_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this one, with its receipt.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most deletions.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Deletions, newest first: how far they are, what they took out, and which adapters had learned from it.

    Examples:  ratchet samples deletions    |    ratchet samples deletions deletion-0123456789ab --json
    """
    from streams.store.deletion import as_json as receipt

    ledger = Ledger.open(ctx.of(context).settings.ledger)
    rows = ledger.deletions(limit) if deletion_id is None else [_one(ledger, deletion_id)]
    if as_json:
        receipts = [receipt(row) for row in rows]
        typer.echo(json.dumps(receipts if deletion_id is None else receipts[0], indent=2))
        return
    if deletion_id is not None:
        _print_receipt(rows[0])
        return
    table = Table(
        Column("deletion", overflow="fold"), "state", Column("selects", overflow="fold"), "samples", "refusals",
        "requested (UTC)", "by",
    )  # fmt: skip
    for row in rows:
        counts = str(row.samples), str(row.refusals)
        add_texts(table, row.id, row.state, _selection(row), *counts, _when(row.requested_at), row.actor)
    Console().print(table)


def _hex(key: str) -> str:
    """The bytes of a key in hex."""
    return key[2:].lower() if key.startswith("0x") else key.encode().hex()


def _one(ledger: Ledger, deletion_id: str) -> DeletionRow:
    row = ledger.deletion(deletion_id)
    if row is None:
        raise LedgerError(f"there is no deletion {deletion_id[:300]!r}.", "See `ratchet samples deletions`.")
    return row


def _follow(ledger: Ledger, deletion_id: str) -> DeletionRow:
    """Wait until a deletion is done, or the bucket holds it, and say how far it is."""
    state, warned = "", False
    with meter(deletion_id) as progress:
        while (row := _one(ledger, deletion_id)).state not in ("held", "done"):
            if row.state != state:
                state = row.state
                say(f"{row.id}: {STATES[state]}")
            if not (warned or _is_maintained(ledger)):
                warned = True
                say("nothing maintains the store now: start `ratchet maintain`")
            progress(lambda shown=STATES[state]: shown)  # type: ignore[misc]
            time.sleep(POLL_SECONDS)
    return row


def _is_maintained(ledger: Ledger) -> bool:
    from streams.store.maintenance import LEASE

    lease = ledger.lease(LEASE)
    return lease is not None and bool(lease.holder) and lease.expires_at > datetime.now(UTC)


def _print_receipt(row: DeletionRow) -> None:
    table = Table("field", Column("value", overflow="fold"), show_header=False)
    adapters: dict[str, list[str]] = row.adapters
    for name, value in (
        ("deletion", row.id),
        ("state", f"{row.state}: {STATES[row.state]}"),
        ("selects", _selection(row)),
        ("samples", f"{row.samples:,}"),
        ("refused records", f"{row.refusals:,}"),
        ("adapters that learned from it", ", ".join(adapters.get("learned", [])) or "none"),
        ("adapters that may have replayed it", ", ".join(adapters.get("may_have_replayed", [])) or "none"),
        ("first update without it", row.update_id or "none yet"),
        ("requested", f"{_when(row.requested_at)} by {row.actor}"),
        ("reason", row.reason),
        ("removed from the store", _when(row.removed_at)),
        ("gone from the store's files", _when(row.held_at or row.done_at)),
        *([("what remains", row.remains)] if row.remains else []),
        *([("what remains is locked until", _when(row.remains_until))] if row.remains_until else []),
        ("gone from all files", _when(row.done_at)),
    ):
        add_texts(table, name, value)
    Console().print(table)


def _selection(row: DeletionRow) -> str:
    selector: dict[str, Any] = row.selector
    return "\n".join(f"{name}: {value}" for name, value in selector.items())


def _when(moment: datetime | None) -> str:
    return "not yet" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
