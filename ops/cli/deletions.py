"""``ratchet samples delete`` and ``ratchet samples deletions``."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from core.errors import LedgerError
from core.ledger import DeletionRow, Ledger
from core.progress import meter, say
from ops.cli import context as ctx
from ops.cli.terminal import SINCE_HELP, AsJson, facts_text, parse_since, show_facts, show_json, show_rows

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
    if key is not None:
        key = key[2:].lower() if key.startswith("0x") else key.encode().hex()
    options: dict[str, str | None] = {
        "id": sample_id, "source": source, "domain": domain, "concept": concept, "label": label, "key": key,
        "record": record, "before": None if moment is None else moment.isoformat(),
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
        _show_receipt(_follow(ledger, row.id))
    else:
        typer.echo(f"{row.id} is requested. See `ratchet samples deletions {row.id}`.")


def list_deletions(
    context: typer.Context,
    deletion_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this one, with its receipt.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most deletions.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Deletions, newest first: how far they are, what they took out, and which adapters had learned from it.

    Examples:  ratchet samples deletions    |    ratchet samples deletions deletion-0123456789ab --json
    """
    from streams.store.deletion import as_json as receipt

    ledger = ctx.ledger_of(context)
    if deletion_id is not None:
        row = _one(ledger, deletion_id)
        show_json(receipt(row)) if as_json else _show_receipt(row)
        return
    rows = ledger.deletions(limit)
    shown = (
        {"deletion": row.id, "state": row.state, "selects": facts_text(row.selector), "samples": row.samples,
         "refusals": row.refusals, "requested": row.requested_at, "by": row.actor}
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Deletions", as_json, data=[receipt(row) for row in rows])


def _one(ledger: Ledger, deletion_id: str) -> DeletionRow:
    row = ledger.deletion(deletion_id)
    if row is None:
        raise LedgerError(f"there is no deletion {deletion_id[:300]!r}.", "See `ratchet samples deletions`.")
    return row


def _follow(ledger: Ledger, deletion_id: str) -> DeletionRow:
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


def _show_receipt(row: DeletionRow) -> None:
    facts = {
        "deletion": row.id, "state": f"{row.state}: {STATES[row.state]}", "selects": facts_text(row.selector),
        "samples": row.samples, "refused records": row.refusals,
        "adapters that learned from it": row.adapters.get("learned") or "none",
        "adapters that may have replayed it": row.adapters.get("may_have_replayed") or "none",
        "first update without it": row.update_id or "none yet",
        "requested": f"{row.requested_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} by {row.actor}", "reason": row.reason,
        "removed from the store": row.removed_at or "not yet",
        "gone from the store's files": row.held_at or row.done_at or "not yet", "what remains": row.remains,
        "what remains is locked until": row.remains_until, "gone from all files": row.done_at or "not yet",
    }  # fmt: skip
    show_facts({name: fact for name, fact in facts.items() if fact is not None})
