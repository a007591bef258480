"""Trials, the guard and what it took back, as the console tells of them and lets operators act on them."""

from __future__ import annotations

import html
from typing import Any

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from ops.console.action_preview import NO_SHARE, Choice, preview
from ops.console.data import ConsoleData
from ops.console.timeline import watching
from ratchet_client import Client
from ratchet_client.calls import Call
from tests.support.story import seen, withdraw
from tests.unit.console.test_action_preview import told
from tests.unit.console.test_actions import PARTIAL
from tests.unit.console.test_security import signed_in


@pytest.fixture(autouse=True)
def _released(ledger: Ledger) -> None:
    """Release 1 serves the base, 2 an adapter to everybody; both adapters are known."""
    for name in ("clip-a", "clip-b"):
        ledger.register_adapter(name, "clip", "base", "i", "t", {})
    release(ledger, None)
    release(ledger, "clip-a")


def release(ledger: Ledger, clip: str | None, share: float = 1.0, actor: str = "ana") -> None:
    live = ledger.live()
    number = (live.number if live else 0) + 1
    ledger.commit_release(
        number, clip=clip, vlm=None, actor=actor, reason=f"number {number}", proposal_id=None, share=share
    )


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the console asks of a server that says yes to everything."""
    asked: list[tuple[str, dict[str, Any]]] = []

    send = Client._call

    def call(self: Client, call: Call[Any]) -> Any:
        if call.body is None:
            return send(self, call)
        asked.append((call.path, dict(call.body)))
        made = {"number": 9, "clip": None, "vlm": None, "prepare_seconds": 0.1, "commit_seconds": 0.1}
        return {**made, "share": call.body.get("share", 1.0)}

    monkeypatch.setattr(Client, "_call", call)
    return asked


def text(page: str) -> str:
    return " ".join(html.unescape(page).split())


def test_a_canary_and_the_stable_release_beside_it_are_told_apart(ledger: Ledger, operator: TestClient) -> None:
    release(ledger, "clip-b", share=0.1)
    for path in ("/releases", "/"):
        page = text(operator.get(path).text)
        assert "On trial: release 3" in page and ">canary 10%<" in page and ">stable<" in page
        assert "It answers 10% of the requests, and release 2, the stable one, the others." in page
    assert "Promote…" in operator.get("/releases").text
    release(ledger, "clip-b", share=0.0)
    page = text(operator.get("/releases").text)
    assert ">shadow<" in page and "It answers no request, and is only compared." in page
    release(ledger, "clip-b")
    page = text(operator.get("/releases").text)
    assert "On trial" not in page and "Promote…" not in page and ">stable<" not in page


def test_what_the_guard_saw_is_shown_while_it_watches(
    ledger: Ledger, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = {"state": "guard", "release": 2, "share": 1.0, "incumbent": 1, "kind": "release", "seconds": 20.0}
    status: dict[str, Any] = {
        "controller": {"started": True, "trouble": "", "resident": [], "in_flight": {},
                       "rollout": {**watch, "seconds_left": 180.0, **seen(2, 1)}},
        "catalog": {"spaces": {}, "corpus_rows": 0},
    }  # fmt: skip
    monkeypatch.setattr(ConsoleData, "_status", lambda _: status)
    for path in ("/releases", "/overview/now"):
        page = text(operator.get(path).text)
        assert "Under guard: release 2" in page and "watched for 3 min more" in page
        assert "38 of 40 inputs agree (95%), at least 70% must" in page
        assert "0 of 160 requests failed, 1 of 940 of release 1" in page and "out of bounds" not in page
    assert watching(status, None) is None and watching(None, ledger.live()) is None
    release(ledger, "clip-b")
    assert watching(status, ledger.live()) is None, "it has not looked at the new release yet"


def test_a_release_that_the_guard_took_back_says_why(ledger: Ledger, operator: TestClient) -> None:
    release(ledger, "clip-b")
    reason = withdraw(ledger, 3, 2, "clip-b")
    assert "The guard is taking it back" in operator.get("/releases").text
    release(ledger, "clip-a", actor="guard")
    page = text(operator.get("/releases").text)
    assert page.count("The guard took it back to what release 2 serves") == 1
    assert "Agreement of the CLIP</span> <span>4 of 40 inputs agree (10%), at least 70% must" in page
    assert page.count(">out of bounds<") == 1 and "by chance less than once in a billion times" in page
    assert "clip-b is withdrawn: no update and no rollback goes back to it" in page
    assert ">taken back by the guard<" in operator.get("/").text
    release(ledger, "clip-b")
    assert text(operator.get("/releases").text).count(reason) == 1, "who releases it again sees why it was withdrawn"


def test_releasing_what_was_withdrawn_warns_although_the_gate_had_passed_it(
    ledger: Ledger, operator: TestClient, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    release(ledger, "clip-b")
    reason = withdraw(ledger, 3, 2, "clip-b")
    release(ledger, "clip-a", actor="guard")
    found = preview(ledger, "release", Choice(clip="clip-b"), resident={})
    assert found.warnings == (f"The guard withdrew clip-b: {reason}.",) and found.force == ("clip-b",)
    assert dict(found.adapters["clip"])["clip-b"] == "withdrawn"
    back = preview(ledger, "rollback", Choice(to=3), resident={})
    assert not back.possible and "clip-b was withdrawn" in told(back)
    shown = operator.get("/releases/release?clip=clip-b", headers=PARTIAL).text
    assert 'name="force" value="clip-b"' in shown and reason in shown
    for warned in ("clip-b", "clip-a", ""):
        form = {"reason": "I am sure", "expected_live": "4", "clip": "clip-b", "force": warned}
        assert operator.post("/releases/release", data=form, headers=PARTIAL).status_code == 200
    assert [body["force"] for _, body in sent] == [True, False, False], "only who was warned of this one insists on it"


def test_a_release_by_hand_goes_to_everybody_to_a_share_or_to_nobody(
    ledger: Ledger, operator: TestClient, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    release(ledger, "clip-b")
    shown = text(operator.get("/releases/release?clip=clip-a&how=canary", headers=PARTIAL).text)
    assert 'name="percent"' in shown and 'value="10"' in shown, "the usual share is offered"
    assert "Release 4 is made as a canary: 10% of the requests get it" in shown
    shadow = operator.get("/releases/release?clip=clip-a&how=shadow", headers=PARTIAL).text
    assert "it answers no request" in shadow and 'name="percent"' not in shadow
    form = {"reason": "step by step", "expected_live": "3", "clip": "clip-a"}
    for how, percent in (("all", "7"), ("canary", "2.5"), ("shadow", "")):
        answer = operator.post("/releases/release", data={**form, "how": how, "percent": percent}, headers=PARTIAL)
        assert answer.status_code == 200, answer.text
    assert [body["share"] for _, body in sent] == [1.0, 0.025, 0.0]
    assert "Release 9 is live everywhere, as a shadow" in answer.text
    assert operator.post("/releases/release", data={**form, "how": "nobody else"}).status_code == 422
    for percent in ("", "0", "100", "-5", "nan", "1e1", "١", "0.000"):
        data = {**form, "how": "canary", "percent": percent}
        answer = operator.post("/releases/release", data=data, headers=PARTIAL)
        assert answer.status_code == 400 and NO_SHARE in answer.text and ">step by step<" in answer.text, percent
    assert len(sent) == 3


def test_what_a_trial_does_and_ends_is_said_before(ledger: Ledger) -> None:
    assert not preview(ledger, "promote", Choice(), resident={}).possible
    tried = preview(ledger, "release", Choice(clip="clip-b", how="canary", percent="25"), resident={})
    assert "25% of the requests get it, a caller always or never. Release 2 answers the others." in told(tried)
    assert "updates wait until then" in told(tried) and tried.possible
    same = Choice(clip="clip-a", how="shadow")
    assert not preview(ledger, "release", same, resident={}).possible, "there is nothing to compare"
    release(ledger, "clip-b", share=0.25)
    wider = Choice(clip="clip-b", how="canary", percent="50")
    assert preview(ledger, "release", wider, resident={}).possible
    assert not preview(ledger, "release", Choice(clip="clip-b", how="canary", percent="25"), resident={}).possible
    promoted = preview(ledger, "promote", Choice(), resident={})
    assert promoted.possible and "What release 3 tries (canary 25%) answers everybody." in told(promoted)
    assert "The CLIP changes from clip-a to clip-b." in promoted.happens
    assert promoted.warnings == ("No gate has passed this adapter, and it was never live: clip-b.",)
    back = preview(ledger, "rollback", Choice(), resident={2: {}})
    assert back.possible and "The trial of release 3 (canary 25%) ends" in told(back)
    assert "The CLIP stays as it is (clip-a)." in back.happens and "less than a second" in told(back)
    ledger.hold("ana", "launch")
    assert "Updates wait until that is over" in told(preview(ledger, "resume", Choice(), resident={}))


def test_a_promotion_is_asked_of_the_server_with_what_was_live(
    ledger: Ledger, operator: TestClient, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    release(ledger, "clip-b", share=0.25)
    assert "Promote now" in operator.get("/releases/promote", headers=PARTIAL).text
    form = {"reason": "a quiet day", "expected_live": "3"}
    answer = operator.post("/releases/promote", data=form, headers=PARTIAL)
    assert "Release 9 is live everywhere" in answer.text
    assert sent == [("/admin/v1/promote", {"reason": "a quiet day", "expected_live": 3})]


@pytest.mark.parametrize("action", ["hold", "resume"])
def test_a_hold_and_its_end_are_asked_of_the_server(
    ledger: Ledger, operator: TestClient, sent: list[tuple[str, dict[str, Any]]], action: str
) -> None:
    if action == "resume":
        ledger.hold("ana", "launch")
    answer = operator.post(f"/releases/{action}", data={"reason": "a quiet day", "expected_live": "2"}, headers=PARTIAL)
    assert answer.status_code == 200, answer.text
    assert sent == [(f"/admin/v1/{action}", {"reason": "a quiet day"})]


def test_a_key_that_may_only_look_cannot_act(
    ledger: Ledger, visitor: TestClient, sent: list[tuple[str, dict[str, Any]]]
) -> None:
    _, reader = ledger.create_key("reader", ["search"], actor="test")
    visitor.headers["x-csrf-token"] = signed_in(visitor, reader)
    assert "<h1>Releases" in visitor.get("/releases").text
    for action in ("rollback", "release", "promote", "hold", "resume"):
        shown = visitor.get(f"/releases/{action}", headers=PARTIAL)
        form = {"reason": "x", "expected_live": "2", "clip": "base"}
        for answer in (shown, visitor.post(f"/releases/{action}", data=form)):
            assert answer.status_code == 403 and "may look, but not act" in html.unescape(answer.text), action
    assert sent == []
