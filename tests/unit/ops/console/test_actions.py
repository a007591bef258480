from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from ops.console.action_preview import NO_SHARE, Action, ActionPreview, Choice, preview
from ratchet_client import Client
from ratchet_client.calls import Call
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.pictures import png
from tests.support.samples import refusal
from tests.support.story import Story, tell, withdraw
from tests.unit.ops.console.conftest import PARTIAL, release, settings, signed_in, text

ACTIONS = ("rollback", "release", "promote", "hold", "resume")
Sent = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def released(ledger: Ledger) -> None:
    """Release 1 serves the base, 2 an adapter to all callers; both adapters are known."""
    for name in ("clip-a", "clip-b"):
        ledger.register_adapter(name, "clip", "b" * 64, "i", "t", {})
    release(ledger)
    release(ledger, "clip-a")


after_release_2 = pytest.mark.usefixtures("released")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    asked: Sent = []
    send = Client._call

    def call(self: Client, call: Call[Any]) -> Any:
        if call.body is None:
            return send(self, call)
        asked.append((call.path, dict(call.body)))
        made = {"number": 9, "clip": None, "vlm": None, "prepare_seconds": 0.1, "commit_seconds": 0.1}
        return {**made, "share": call.body.get("share", 1.0)}

    monkeypatch.setattr(Client, "_call", call)
    return asked


def planned(ledger: Ledger, action: Action, choice: Choice | None = None, *resident: int) -> ActionPreview:
    return preview(ledger, action, choice or Choice(), dict.fromkeys(resident))


def told(found: ActionPreview) -> str:
    return " ".join(found.happens)


# What an action would do, in words


def test_a_rollback_names_both_models_and_how_long_it_takes_where_there_is_one(ledger: Ledger) -> None:
    assert not planned(ledger, "rollback").possible
    release(ledger)
    found = planned(ledger, "rollback")
    assert not found.possible and "no release before 1" in told(found)
    release(ledger)
    assert not planned(ledger, "rollback", Choice(to=1)).possible, "it serves the same"
    release(ledger, "clip-a", "vlm-a")
    release(ledger, "clip-b", "vlm-a")
    found = planned(ledger, "rollback", None, 4, 3)
    assert (found.live, found.possible, found.verb) == (4, True, "Roll back now")
    assert {"The CLIP changes from clip-b to clip-a.", "The VLM stays as it is (vlm-a)."} <= set(found.happens)
    assert "less than a second" in told(found)
    assert [row.number for row in found.targets] == [3, 2, 1]
    far = planned(ledger, "rollback", Choice(to=1), 4, 3)
    assert "from vlm-a to the base alone" in told(far) and "not loaded any more" in told(far)
    release(ledger, "clip-b", "vlm-b")
    one = set(planned(ledger, "rollback", Choice(family="clip")).happens)
    assert {"The CLIP changes from clip-b to clip-a.", "The VLM stays as it is (vlm-b)."} <= one


def test_releasing_what_the_gate_rejected_warns(ledger: Ledger, tmp_path: Path) -> None:
    story: Story = tell(settings(tmp_path), tmp_path / "made")
    release(ledger, story.adapter)
    assert not planned(ledger, "release").possible
    bad = planned(ledger, "release", Choice(clip="clip-ba9876543210"))
    assert bad.possible and bad.warnings == ("The gate rejected this adapter: clip-ba9876543210.",)
    base = planned(ledger, "release", Choice(clip="base"))
    assert base.warnings == () and f"from {story.adapter} to the base alone" in told(base)
    assert not planned(ledger, "release", Choice(clip=story.adapter)).possible
    assert dict(base.adapters["clip"]) == {story.adapter: "passed", "clip-ba9876543210": "rejected"}


# Pages and forms


@after_release_2
def test_a_release_that_the_guard_took_back_says_why_and_warns(
    ledger: Ledger, operator: TestClient, sent: Sent
) -> None:
    release(ledger, "clip-b")
    reason = withdraw(ledger, 3, 2, "clip-b")
    assert "The guard is taking it back" in operator.get("/releases").text
    release(ledger, "clip-a", actor="guard")
    page = text(operator, "/releases")
    assert page.count("The guard took it back to what release 2 serves") == 1
    assert "Agreement of the CLIP</span> <span>4 of 40 inputs agree (10%), at least 70% must" in page
    assert page.count(">out of bounds<") == 1 and "by chance less than once in a billion times" in page
    assert "clip-b is withdrawn: no update and no rollback goes back to it" in page
    assert ">taken back by the guard<" in operator.get("/").text
    found = planned(ledger, "release", Choice(clip="clip-b"))
    assert found.warnings == (f"The guard withdrew clip-b: {reason}.",) and found.force == ("clip-b",)
    assert dict(found.adapters["clip"])["clip-b"] == "withdrawn"
    back = planned(ledger, "rollback", Choice(to=3))
    assert not back.possible and "clip-b was withdrawn" in told(back)
    shown = operator.get("/releases/release?clip=clip-b", headers=PARTIAL).text
    assert 'name="force" value="clip-b"' in shown and reason in shown
    for warned in ("clip-b", "clip-a", ""):
        form = {"reason": "I am sure", "expected_live": "4", "clip": "clip-b", "force": warned}
        assert operator.post("/releases/release", data=form, headers=PARTIAL).status_code == 200
    assert [body["force"] for _, body in sent] == [True, False, False], "only who was warned of this one insists on it"
    release(ledger, "clip-b")
    assert text(operator, "/releases").count(reason) == 1, "who releases it again sees why it was withdrawn"


@after_release_2
def test_a_release_by_hand_goes_to_all_to_a_share_or_to_nobody(
    ledger: Ledger, operator: TestClient, sent: Sent
) -> None:
    release(ledger, "clip-b")
    shown = operator.get("/releases/release?clip=clip-a&how=canary", headers=PARTIAL).text
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


@after_release_2
def test_operators_act_and_readers_look(ledger: Ledger, operator: TestClient, key: str, sent: Sent) -> None:
    release(ledger, "clip-b", share=0.25)
    form = {"reason": "a quiet day", "expected_live": "3", "clip": "base"}
    for action in ("promote", "hold", "resume"):
        answer = operator.post(f"/releases/{action}", data=form, headers=PARTIAL)
        assert answer.status_code == 200, answer.text
        assert ("Release 9 is live everywhere" in answer.text) is (action == "promote")
        ledger.hold("ana", "launch")
    because = {"reason": "a quiet day"}
    promoted = ("/admin/v1/promote", {**because, "expected_live": 3})
    assert sent == [promoted, ("/admin/v1/hold", because), ("/admin/v1/resume", because)]
    _, reader = ledger.create_key("reader", ["search"], actor="test")
    operator.headers["x-csrf-token"] = signed_in(operator, reader)
    assert "<h1>Releases" in operator.get("/releases").text
    for action in ACTIONS:
        shown = operator.get(f"/releases/{action}", headers=PARTIAL)
        for answer in (shown, operator.post(f"/releases/{action}", data=form)):
            assert answer.status_code == 403 and "may look, but not act" in html.unescape(answer.text), action
    assert len(sent) == 3


def test_refused_records_are_shown_and_sent(
    operator: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.kafka.clients.CONNECT_SECONDS", 0.3)
    values = (json.dumps({"text": "<b>bold</b>", "domain": "cats"}).encode(), png())
    rows = [{**refusal(0, at, value, "image_undecodable"), "source": f"<cam {at}>"} for at, value in enumerate(values)]
    SampleStore(settings(tmp_path).lake).put(rows, [Position("samples", 0, len(rows))])
    page = operator.get("/quarantine").text
    assert page.count('class="card"><img') == 2 and "The picture is damaged" in page
    assert "No record was refused for this reason" in operator.get("/quarantine?reason=empty").text
    assert '<option value="&lt;cam 1&gt;" >&lt;cam 1&gt; (1)</option>' in page and "The picture is damaged (2)" in page
    of_one = operator.get("/quarantine", params={"source": "<cam 1>"}).text
    assert of_one.count('class="card"><img') == 1 and "samples:0:1" in of_one
    assert "No record of this source was refused" in operator.get("/quarantine?source=other").text
    record = operator.get("/quarantine/samples:0:0", headers=PARTIAL).text
    assert "&lt;b&gt;bold&lt;/b&gt;" in record and "byte for byte" in record
    pictures = [operator.get(f"/quarantine/samples:0:{offset}/picture").headers["content-type"] for offset in (0, 1)]
    assert pictures == ["image/svg+xml", "image/png"], "the sign for no picture, and a picture drawn again"
    for place in ("samples:0:9", "nowhere"):
        assert operator.get(f"/quarantine/{place}").status_code == 404
    form = {"reason": "try it", "csrf": operator.headers["x-csrf-token"]}
    answer = operator.post("/quarantine/samples:0:0/resubmit", data=form, headers=PARTIAL)
    assert answer.status_code == 502 and "Not sent" in answer.text and ">try it</textarea>" in answer.text
    assert "could not be sent" in operator.get("/quarantine").text
