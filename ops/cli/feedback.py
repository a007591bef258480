"""``ratchet feedback``: what callers say of answers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from core.errors import ConfigError
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, Reason, show_rows, write_images

if TYPE_CHECKING:
    from core.ledger.rows import FeedbackVerdict

VERDICTS: Final[tuple[FeedbackVerdict, ...]] = ("right", "wrong", "correct", "chosen")
FIELDS: Final = (
    "id", "created_at", "caller", "release", "route", "input", "answered_at", "verdict", "detail", "state", "outcome",
)  # fmt: skip
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="First 8 digits of each, or more.")]
app = typer.Typer(help="Show what callers say of answers.", no_args_is_help=True)


@app.command("list")
def list_feedback(
    context: typer.Context,
    verdict: Annotated[str | None, typer.Option(help="right, wrong, correct or chosen.")] = None,
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Corrections with an image that wait for a review.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="As --waiting; writes the images to this folder, named by their IDs.")
    ] = None,
    release: Annotated[int | None, typer.Option(help="Of the answers of this release.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    as_json: AsJson = False,
) -> None:
    """The newest feedback, with who gave it. Times are in UTC.

    Examples:  ratchet feedback list --verdict correct    |    ratchet feedback list --waiting --out images/
    """
    wanted = next((each for each in VERDICTS if each == verdict), None)
    if verdict is not None and wanted is None:
        raise ConfigError(f"--verdict: there is no {verdict!r}.", f"One of {', '.join(VERDICTS)}.")
    ledger = ctx.ledger_of(context)
    if waiting or out is not None:
        rows = ledger.corrections("waiting", limit, images=out is not None)
    else:
        rows = ledger.feedback(limit, verdict=wanted, release=release)
    if out is not None:
        write_images(out, ((row.id[:8], row.image or b"") for row in rows))
    shown = (
        {"id": row.id[:8], "when": row.created_at, "caller": row.caller, "release": row.release, "route": row.route,
         "verdict": row.verdict, "says": "; ".join(f"{name}: {value}" for name, value in row.detail.items())}
        for row in rows
    )  # fmt: skip
    show_rows(shown, "Feedback", as_json, data=[{name: getattr(row, name) for name in FIELDS} for row in rows])


@app.command()
def accept(
    context: typer.Context,
    ids: Ids,
    reason: Reason,
    label: Annotated[str | None, typer.Option(help="The right class, instead of what the caller said.")] = None,
    text: Annotated[str | None, typer.Option(help="The right caption, instead of what the caller said.")] = None,
) -> None:
    """Make samples of waiting corrections: maintenance sends them to the stream, with the source `feedback:CALLER`.

    Example:  ratchet feedback accept 1f3a9c02 --label "fire truck" --reason "looked at it"
    """
    _review(context, ids, True, reason, {"label": label, "text": text})


@app.command()
def dismiss(context: typer.Context, ids: Ids, reason: Reason) -> None:
    """Dismiss waiting corrections, and forget their images.

    Example:  ratchet feedback dismiss 1f3a9c02 --reason "another car"
    """
    _review(context, ids, False, reason, {})


def _review(context: typer.Context, ids: list[str], accepted: bool, reason: str, edit: dict[str, str | None]) -> None:
    ledger = ctx.ledger_of(context)
    for each in ids:
        row = ledger.review_correction(each, accepted, actor=ctx.person(), reason=reason, **edit)
        typer.echo(f"{row.id[:8]} of {row.caller} is {row.state}")


@app.command()
def stats(context: typer.Context, as_json: AsJson = False) -> None:
    """Counts by release and route. Few answers are reported, and not at random: compare releases, not shares.

    Example:  ratchet feedback stats
    """
    counts = ctx.ledger_of(context).feedback_counts()
    table: dict[tuple[int, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(VERDICTS, 0))
    for row in counts:
        table[row["release"], row["route"]][row["verdict"]] = row["count"]
    rows = ({"release": release, "route": route, **by} for (release, route), by in table.items())
    show_rows(rows, "Feedback", as_json, data=counts)
