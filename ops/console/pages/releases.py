"""The timeline of releases, and operators' actions, each with a preview and a confirmation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query
from fastapi.responses import Response

from ops.console import action_preview
from ops.console.action_preview import BASE, NO_SHARE, Action, Choice, How
from ops.console.data import ACTION_SECONDS
from ops.console.request_context import Operator, Reader, RequestContext
from ops.console.timeline import FAMILIES, on_trial, timeline, unreleased, watching
from ratchet_client import Client, Conflict, ServerError
from serving.releases.leadership import clip_bases

router = APIRouter()
PAGE = 30
MOST = 500
Name = Annotated[str, Form(max_length=64)]


@router.get("/releases")
def releases(context: Reader, limit: Annotated[int, Query(ge=1, le=MOST)] = PAGE) -> Response:
    ledger, live = context.data.ledger, context.data.ledger.live()
    entries = timeline(ledger, context.data.resident_releases(), limit + 1)
    bases = clip_bases([entry.row for entry in entries], context.data.base_names(), context.data.settings.base.clip)
    return context.page(
        "releases.html", "Releases", entries=entries[:limit], more=limit + PAGE if len(entries) > limit < MOST else 0,
        held=ledger.held(), proposals=unreleased(ledger), away=context.data.status() is None,
        trial=on_trial(live), stable=ledger.stable(), watch=watching(context.data.status(), live),
        bases=bases, failed_audits=[row for family in FAMILIES if (row := ledger.failed_audit(family))],
    )  # fmt: skip


@router.get("/releases/{action}")
def ask(
    context: Operator,
    action: Action,
    to: Annotated[str, Query(max_length=12)] = "",
    family: Annotated[str, Query(max_length=8)] = "",
    clip: Annotated[str, Query(max_length=64)] = "",
    vlm: Annotated[str, Query(max_length=64)] = "",
    how: Annotated[How, Query()] = "all",
    percent: Annotated[str, Query(max_length=12)] = "",
    reason: Annotated[str, Query(max_length=1000)] = "",
) -> Response:
    usual = f"{100 * context.data.settings.rollout.share:.5g}"
    return _asked(context, action, Choice.of(to, family, clip, vlm, how, percent or usual), typed=reason)


@router.post("/releases/{action}")
def act(
    context: Operator,
    action: Action,
    expected_live: Annotated[int, Form(ge=0)],
    reason: Annotated[str, Form(max_length=1000)] = "",
    to: Annotated[str, Form(max_length=12)] = "",
    family: Annotated[str, Form(max_length=8)] = "",
    clip: Name = "",
    vlm: Name = "",
    how: Annotated[How, Form()] = "all",
    percent: Annotated[str, Form(max_length=12)] = "",
    force: Annotated[str, Form(max_length=200)] = "",
) -> Response:
    """Act under the visitor's own key; the server writes actor and reason to the audit log."""
    choice = Choice.of(to, family, clip, vlm, how, percent)
    reason = reason.strip()
    if not reason:
        return _asked(context, action, choice, wrong="Say why: it is kept in the audit log.", status=400)
    if action == "release" and choice.share is None:
        return _asked(context, action, choice, wrong=NO_SHARE, typed=reason, status=400)
    named = [name for name in choice.adapters.values() if name != BASE]
    warned = set(force.split())
    meant = bool(warned) and set(action_preview.unproven(context.data.ledger, named)) <= warned
    try:
        with context.client(ACTION_SECONDS) as client:
            made = _do(client, action, choice, reason, expected_live, meant)
    except Conflict as conflict:
        live = context.data.ledger.live()
        return context.dialog(
            "conflict.html", "Another operator was faster", 409, message=conflict.message, live=live,
            seen=expected_live, action=action, query=choice.query,
        )  # fmt: skip
    except ServerError as error:
        wrong = error.message if error.status else f"{error.message} Look at the list before you try again."
        return _asked(context, action, choice, wrong=wrong, typed=reason, status=502 if error.status == 0 else 422)
    finally:
        context.data.invalidate()
    return context.dialog("done.html", "Done", action=action, made=made)


def _asked(
    context: RequestContext, action: Action, choice: Choice, *, wrong: str = "", typed: str = "", status: int = 200
) -> Response:
    picking = context.request.headers.get("hx-trigger", "").startswith("pick-")  # then the form keeps its place
    resident = context.data.resident_releases(fresh=True)
    preview = action_preview.preview(context.data.ledger, action, choice, resident)
    return context.dialog(
        "action.html", preview.title, status, preview=preview, choice=choice, action=action, wrong=wrong, typed=typed,
        picking=picking,
    )  # fmt: skip


def _do(
    client: Client, action: Action, choice: Choice, reason: str, expected_live: int, force: bool
) -> dict[str, object]:
    if action == "rollback":
        return client.rollback(reason, to=choice.to, expected_live=expected_live, timeout=ACTION_SECONDS,
                               family=choice.family)  # fmt: skip
    if action == "release":
        return client.release(choice.clip or ..., reason, expected_live, ACTION_SECONDS, vlm=choice.vlm or ...,
                              share=1.0 if choice.share is None else choice.share, force=force)  # fmt: skip
    if action == "promote":
        return client.promote(reason, expected_live)
    if action == "hold":
        client.hold(reason)
    else:
        client.resume(reason)
    return {}
