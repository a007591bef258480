from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from core.errors import LedgerError
from core.ledger import Ledger
from ops.console.app import build_console
from ops.console.pages.overview import problems
from ops.console.public import MOST_SHARED, SHARED_SECONDS, SharedPages
from ops.console.security import Session
from streams.store.deletion import request_deletion
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import put, sample
from tests.support.story import EVIL, Story, tell, withdraw
from tests.unit.ops.console.conftest import LOCAL, settings, signed_in
from tests.unit.ops.console.test_pages import PAGES

OPEN = ("/", "/releases", "/models", "/gate", "/stream", "/budget")
SECRETS = ("the customer complained", "cam-7", "postgres://", "deletion-", "key:")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public")


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    """A ledger and a store that contain things that must not be shown."""
    made = tell(settings(home), home / "made")
    ledger = Ledger.open(settings(home).ledger)
    ledger.register_adapter(made.adapter, "clip", "base", "i", "t", {})
    ledger.commit_release(1, clip=None, vlm=None, actor="ratchet", reason="postgres://db is away", proposal_id=None)
    ledger.commit_release(2, clip=made.adapter, vlm=None, actor="updater", reason="update passed", proposal_id=None)
    withdraw(ledger, 2, 1, made.adapter)
    ledger.commit_release(
        3, clip=None, vlm=None, actor="key:ana/console", reason="the customer complained", proposal_id=None
    )
    ledger.hold("key:ana", "the customer complained")
    ledger.begin_update(
        "update-failed", family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to={}, incumbent=None
    )
    ledger.advance_update("update-failed", "failed", error="postgres://db is away")
    request_deletion(ledger, {"source": "cam-7"}, actor="key:ana", reason="the customer complained")
    ledger.close()
    row = sample(0, 0, id="0" * 64, text="a cat", domain="cats", source="cam-7")
    put(SampleStore(settings(home).lake), [row], Position("samples", 0, 1))
    return made


def public(home: Path, **console: object) -> TestClient:
    return TestClient(build_console(settings(home, public=True, **console)), base_url=LOCAL, follow_redirects=False)


@pytest.fixture
def screen(home: Path, story: Story) -> Iterator[TestClient]:
    with public(home) as client:
        yield client


@pytest.mark.parametrize("page", OPEN)
def test_a_page_is_shown_without_a_key_a_form_or_a_secret_and_asks_again(screen: TestClient, page: str) -> None:
    answer = screen.get(page)
    assert answer.status_code == 200, answer.text
    assert "<form" not in answer.text and "csrf" not in answer.text and "/sign-in" not in answer.text
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert [secret for secret in SECRETS if secret in html.unescape(answer.text)] == []
    assert f'hx-get="{page}" hx-trigger="every 10s" hx-select="#main"' in answer.text
    assert '<noscript><meta http-equiv="refresh"' in answer.text, "also without a script"
    for link in re.findall(r'href="(/[^"#?]*)', answer.text):
        assert screen.get(link).status_code == 200, f"{page} leads to {link}"


def test_what_is_shown_is_what_happened(screen: TestClient) -> None:
    timeline = html.unescape(screen.get("/releases").text)
    assert "Release 3" in timeline and "an operator" in timeline and "update passed" in timeline
    assert "Updates are on hold" in timeline and "4 of 40 inputs agree" in timeline
    assert "1 waiting" in screen.get("/stream").text and "cats" in screen.get("/stream").text


def test_every_route_that_posts_refuses(home: Path, screen: TestClient) -> None:
    whole = build_console(settings(home))
    posts = [route for route in whole.routes if isinstance(route, APIRoute) and "POST" in route.methods]
    assert len(posts) >= 8
    ledger = Ledger.open(settings(home).ledger)
    before = (ledger.live(), len(ledger.audit_rows(500)))
    key = settings(home).operator_key().get_secret_value()
    form = {"reason": "x", "expected_live": "3", "key": key, "text": "x", "action": "x", "left": "1", "right": "2"}
    for route in posts:
        path = route.path.format(action="rollback", place="samples:0:0")
        answer = screen.post(path, data=form, headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.text) == (403, "this console is public and read-only."), path
    for method in ("PUT", "DELETE", "PATCH"):
        assert screen.request(method, "/releases").status_code == 403
    for action in ("rollback", "release", "promote", "hold", "resume"):
        answer = screen.get(f"/releases/{action}")
        assert answer.status_code == 403 and "read-only" in answer.text and "<form" not in answer.text
    assert (ledger.live(), len(ledger.audit_rows(500))) == before
    ledger.close()


def test_what_needs_a_key_elsewhere_is_not_there(screen: TestClient, story: Story) -> None:
    for page in set(PAGES) - set(OPEN):
        assert screen.get(page).status_code == 404, page
    for page in (f"/gate/{story.rejected}/report", f"/gate/{story.rejected}/data", "/samples/" + "0" * 64 + ".png"):
        assert screen.get(page).status_code == 404, page
    overview = screen.get("/").text
    assert "tour.js" not in overview and 'id="tour"' not in overview


def test_a_session_of_an_operator_counts_for_nothing(home: Path, story: Story, screen: TestClient) -> None:
    with TestClient(build_console(settings(home)), base_url=LOCAL, follow_redirects=False) as other:
        signed_in(other, settings(home).operator_key().get_secret_value())
        screen.cookies = other.cookies
    answer = screen.get("/releases")
    assert "Roll back" not in answer.text and "set-cookie" not in answer.headers


def test_a_verdict_is_shown_without_its_samples_unless_the_setting_says_so(home: Path, story: Story) -> None:
    with public(home) as screen:
        page = html.unescape(screen.get(f"/gate/{story.rejected}").text)
    assert "Change per suite" in page and "now first" not in page and "/samples/" not in page
    with public(home, public_samples=True) as screen:
        page = screen.get(f"/gate/{story.rejected}").text
        assert "now first" in page and EVIL not in page
        assert screen.get("/samples/" + "0" * 64 + ".png").status_code == 200


def test_an_address_that_asks_too_often_is_told_when_to_come_back(
    home: Path, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.console.app.PUBLIC_REQUESTS_PER_MINUTE", 3)
    with public(home) as screen:
        answers = [screen.get("/nowhere") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [404, 404, 404, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert screen.get("/health/live").status_code == 200, "probes are not counted"


def test_messages_of_errors_are_not_shown(home: Path, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Ledger) -> None:
        raise LedgerError("postgres://db is away.", "Start /srv/db.")

    with public(home) as screen:
        monkeypatch.setattr(Ledger, "live", away)
        answer = screen.get("/models")
    assert answer.status_code == 503 and "postgres" not in answer.text and "/srv/db" not in answer.text
    status = {
        "controller": {"started": True, "trouble": "postgres://db", "resident": []}, "vlm_problem": "/srv/model",
        "catalog": {"spaces": {}},
    }  # fmt: skip
    assert problems(status, public=True) == [
        "The last release could not be made.", "Questions about pictures are not answered yet.",
    ]  # fmt: skip


class Pages:
    """Records how often it was asked, and with which key."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        assert await request.body() == b""
        self.calls.append((request.url.path, scope["state"]["session"].key))
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("the ledger is away")
        await PlainTextResponse(f"answer {len(self.calls)}", headers={"x-page": scope["path"]})(scope, receive, send)


def sharing(app: Any, key: str = "") -> httpx.AsyncClient:
    async def with_session(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"session": Session.new(key)}
        await app(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(with_session), base_url="http://screen")


async def test_visitors_at_once_get_one_answer_that_was_made_without_a_key() -> None:
    pages = Pages()
    async with sharing(SharedPages(pages), key="of an operator") as screen:
        answers = await asyncio.gather(*(screen.get("/releases") for _ in range(20)))
    assert {answer.text for answer in answers} == {"answer 1"} and answers[-1].headers["x-page"] == "/releases"
    assert pages.calls == [("/releases", "")]


async def test_another_page_a_part_of_it_and_a_later_visitor_have_answers_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = Pages()
    async with sharing(SharedPages(pages)) as screen:
        for url, headers in (("/", {}), ("/gate", {}), ("/gate?page=2", {}), ("/gate", {"hx-request": "true"})):
            await screen.get(url, headers=headers)
        assert len(pages.calls) == 4
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + SHARED_SECONDS)
        assert (await screen.get("/gate")).text == "answer 5"


async def test_a_failure_and_a_probe_are_not_shared() -> None:
    pages = Pages()
    async with sharing(SharedPages(pages)) as screen:
        pages.fails = True
        with pytest.raises(OSError, match="away"):
            await screen.get("/")
        pages.fails = False
        assert (await screen.get("/")).text == "answer 2"
        await screen.get("/health/live")
        await screen.get("/health/live")
    assert len(pages.calls) == 4


async def test_answers_that_are_kept_are_bounded() -> None:
    shared = SharedPages(Pages())
    async with sharing(shared) as screen:
        for number in range(MOST_SHARED + 10):
            await screen.get(f"/?{number}")
    assert len(shared._answers) == MOST_SHARED
