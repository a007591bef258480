"""The page of held samples and distrusted sources: what it shows, to whom, and what an action changes."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from core.errors import StoreUnavailable
from core.ledger import Ledger
from ops.console.pages import held
from streams.store.rows import SPLITS, Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.inputs import pictures
from tests.support.samples import TOPIC, sample
from tests.support.story import EVIL
from tests.unit.ops.console.conftest import settings, signed_in, text

PART = {"hx-request": "true", "hx-target": "held"}


def row(number: int, reason: str = "held_agreement", source: str | None = "shop", **fields: Any) -> dict[str, Any]:
    known = {"split": "held_train", "domain": "streets", "reason": reason, "detail": f"detail {number}"}
    return sample(0, number, source=source, **known | fields)


ROWS = [
    row(0, image=pictures(1)[0]), row(1, "held_quota", f"vendor {EVIL}", text=EVIL, detail=EVIL, domain=EVIL),
    row(2, "held_source", None, image=b"GIF89a and no more", text="", question="what?", answer="a bus", domain=None),
    row(3, split="held_fresh_eval"), sample(0, 4, text="used"),
]  # fmt: skip
IDS = [each["id"] for each in ROWS]


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    store = SampleStore(settings(tmp_path).lake)
    store.put(ROWS, [Position(TOPIC, 0, len(ROWS))])
    return store


def shown(page: str) -> list[int]:
    """Numbers of the rows that a page shows, in order."""
    return [IDS.index(each) for each in re.findall(r'<img src="/samples/([0-9a-f]{64})\.png', page)]


def act(operator: TestClient, path: str = "/held", status: int = 200, **form: Any) -> str:
    answer = operator.post(path, data=form, headers=PART)
    assert answer.status_code == status, answer.text
    assert "<h1>" not in answer.text
    return html.unescape(answer.text)


def splits(store: SampleStore) -> list[int]:
    return [store.tally()[split] for split in SPLITS]


def test_held_samples_are_shown_with_pictures_and_reasons_and_texts_stay_texts(
    operator: TestClient, store: SampleStore
) -> None:
    page = operator.get("/held").text
    assert shown(page) == [3, 2, 1, 0] and EVIL not in page and page.count("<script>") == 0
    plain = text(operator, "/held")
    for words in (
        "Image and text agree less than usual (2)",
        "vendor <script>",
        "what? → a bus",
        "detail 3",
        "no source",
    ):
        assert words in plain, words
    assert operator.get(f"/samples/{IDS[0]}.png?size=96").headers["content-type"] == "image/png"
    assert operator.get(f"/samples/{IDS[2]}.png?size=96").headers["content-type"] == "image/svg+xml"
    assert "Held</dt><dd>4" in operator.get("/stream").text


def test_the_list_is_narrowed_to_a_source_and_a_reason(operator: TestClient, store: SampleStore) -> None:
    def narrowed(**query: str) -> list[int]:
        return shown(operator.get("/held", params=query).text)

    assert narrowed(source="shop") == [3, 0] and narrowed(source=f"vendor {EVIL}") == [1]
    assert narrowed(reason="held_quota") == [1] and narrowed(source="shop", reason="held_quota") == []
    assert narrowed(reason="no reason") == [3, 2, 1, 0] and narrowed(source="' OR '1'='1") == []
    page = operator.get("/held", params={"source": f"vendor {EVIL}"}).text
    (action,) = set(re.findall(r'hx-post="(/held\?[^"]*)"', page))
    assert shown(operator.post(html.unescape(action), data={"only": IDS[1]}, headers=PART).text) == []


def test_the_page_of_a_full_store_shows_the_newest(
    operator: TestClient, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "SHOWN", 2)
    page = text(operator, "/held")
    assert "The newest 2 are shown" in page and shown(operator.get("/held").text) == [3, 2]


def test_one_or_the_chosen_ones_are_accepted_and_it_is_recorded(
    operator: TestClient, store: SampleStore, ledger: Ledger
) -> None:
    page = act(operator, only=IDS[1], ids=[IDS[0]])
    assert "1 sample is accepted" in page and shown(page) == [3, 2, 0]
    page = act(operator, ids=[IDS[0], IDS[3]], why="seen <b>")
    assert "2 samples are accepted" in page and shown(page) == [2] and splits(store) == [3, 1, 1, 0]
    assert "agree less than usual (0)" in page
    noted = [(each.actor, each.action, each.subject, each.detail["reason"]) for each in ledger.audit_rows(2)]
    assert noted == [
        ("operator", "accept samples", "samples", "seen <b>"),
        ("operator", "accept samples", f"sample {IDS[1]}", held.REASON),
    ]  # fmt: skip
    page = act(operator, ids=[IDS[0], IDS[2]])
    assert "1 sample is accepted, 1 not" in page and "Nothing is held" in page
    answer = operator.post("/held", data={"only": IDS[0]})
    assert answer.status_code == 200 and "<h1>" in answer.text, "also without a script"


@pytest.mark.parametrize("form", [{}, {"ids": ["no id", "' OR '1'='1"]}, {"only": "F" * 64}])
def test_without_a_choice_nothing_is_accepted(
    operator: TestClient, store: SampleStore, ledger: Ledger, form: dict[str, Any]
) -> None:
    assert "Choose samples first" in act(operator, status=422, **form)
    assert splits(store) == [1, 0, 3, 1] and ledger.audit_rows(1)[0].action == "sign in"
    operator.post("/held", data={"ids": IDS[:1] * 1000}, headers=PART)
    assert splits(store) == [1, 0, 3, 1]


def test_a_store_that_is_away_is_said_and_the_samples_stay_held(
    operator: TestClient, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> int:
        raise StoreUnavailable("the store is away.", "Bring it back.")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "accept", away)
        assert "the store is away" in act(operator, status=503, only=IDS[0])
    assert "accepted" in act(operator, only=IDS[0])


def test_sources_are_distrusted_and_trusted_again_each_with_a_reason(
    operator: TestClient, store: SampleStore, ledger: Ledger
) -> None:
    ledger.distrust(f"cam {EVIL}", actor="updater", reason=f"passed without {EVIL}", update_id="update-1")
    page = operator.get("/held").text
    assert EVIL not in page and 'href="/gate/update-1"' in page
    page = act(operator, "/held/sources", name="shop", why="swapped captions", decision="distrust")
    assert "shop is distrusted" in page and "By operator: swapped captions" in page
    page = act(operator, "/held/sources", name=f"cam {EVIL}", why="again", decision="distrust")
    assert "By updater: passed without" in page
    for form in ({"name": " ", "why": "x"}, {"name": "shop", "why": " "}, {"why": "x"}):
        for decision in ("trust", "distrust"):
            assert "Nothing was changed" in act(operator, "/held/sources", 422, decision=decision, **form)
    assert "learned from again" in act(operator, "/held/sources", name="shop", why="repaired", decision="trust")
    assert "is trusted" in act(operator, "/held/sources", 409, name="shop", why="repaired", decision="trust")
    assert operator.post("/held/sources", data={"name": "a", "why": "b", "decision": "no"}).status_code == 422
    assert [each.source for each in ledger.distrusted()] == [f"cam {EVIL}"]
    assert [each.action for each in ledger.audit_rows(3)] == ["trust", "distrust", "distrust"]


def test_a_reader_sees_what_is_held_and_changes_nothing(
    operator: TestClient, store: SampleStore, ledger: Ledger
) -> None:
    ledger.distrust("shop", actor="updater", reason="x")
    paths: dict[str, dict[str, str]] = {
        "/held": {"only": IDS[0]}, "/held/sources": {"name": "shop", "why": "x", "decision": "trust"},
    }  # fmt: skip
    token = operator.headers.pop("x-csrf-token")
    for path, form in paths.items():
        for headers in (PART, {**PART, "x-csrf-token": "guessed"}):
            answer = operator.post(path, data=form, headers=headers)
            assert answer.status_code == 403 and "too old" in answer.text
    operator.post("/sign-out", data={"csrf": token})
    assert "/sign-in?next=/held" in operator.get("/held").text
    _, key = ledger.create_key("reader", ["search"], actor="test")
    operator.headers["x-csrf-token"] = signed_in(operator, key)
    page = operator.get("/held").text
    assert shown(page) == [3, 2, 1, 0] and "checkbox" not in page and 'name="decision"' not in page
    for path, form in paths.items():
        assert operator.post(path, data=form, headers=PART).status_code == 403
    assert splits(store) == [1, 0, 3, 1] and len(ledger.distrusted()) == 1


def test_an_empty_installation_has_nothing_held(operator: TestClient) -> None:
    page = text(operator, "/held")
    assert "Nothing is held" in page and "All sources are trusted" in page
