"""Every page, from a ledger and a store with a story: in a console with keys, and in a public one."""

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
from ops.console.request_context import NAV
from ops.console.security import Session
from streams.store.deletion import request_deletion
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import put, sample
from tests.support.story import EVIL, Story, tell, withdraw
from tests.unit.ops.console.conftest import LOCAL, settings, signed_in, text

PAGES = (*(link for link, _ in NAV), "/audit/deletions", "/tour", "/sign-in")
OPEN = ("/", "/releases", "/models", "/gate", "/stream", "/budget")
SECRETS = ("the customer complained", "cam-7", "postgres://", "deletion-", "key:")
PICTURE = "/samples/" + "0" * 64 + ".png"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    """A ledger and a store that contain markup, and things that must not be shown to everybody."""
    made = tell(settings(home), home / "made")
    ledger = Ledger.open(settings(home).ledger)
    ledger.register_adapter(made.adapter, "clip", "base", "i", "t", {})
    ledger.commit_release(1, clip=None, vlm=None, actor="ratchet", reason="postgres://db is away", proposal_id=None)
    wish = ledger.propose("update", clip=made.adapter, actor="updater", reason="update passed", update_id=made.passed)
    ledger.commit_release(2, clip=made.adapter, vlm=None, actor="updater", reason=wish.reason, proposal_id=wish.id)
    withdraw(ledger, 2, 1, made.adapter)
    reason = f"the customer complained {EVIL}"
    ledger.commit_release(3, clip=None, vlm=None, actor="key:ana/console", reason=reason, proposal_id=None)
    ledger.hold("key:ana", reason)
    data: dict[str, Any] = {"recipe": {}, "seed": 0, "store_version": 0, "data_from": {}, "data_to": {}}
    ledger.begin_update("update-failed", family="clip", incumbent=None, **data)
    ledger.advance_update("update-failed", "failed", error="postgres://db is away")
    request_deletion(ledger, {"source": "cam-7"}, actor="key:ana", reason=reason)
    ledger.close()
    row = sample(0, 0, id="0" * 64, text="a cat", domain="cats", source="cam-7")
    put(SampleStore(settings(home).lake), [row], Position("samples", 0, 1))
    return made


@pytest.fixture(scope="module")
def reader(home: Path, story: Story) -> Iterator[TestClient]:
    with TestClient(build_console(settings(home)), base_url=LOCAL, follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_without_a_server(reader: TestClient, page: str) -> None:
    answer = reader.get(page)
    assert answer.status_code == 200, answer.text
    assert "<h1>" in answer.text
    assert "<script>" not in answer.text and "style=" not in answer.text, "the policy forbids both"
    assert "<img src=x" not in answer.text and (page not in ("/releases", "/audit") or "&lt;script&gt;" in answer.text)


def test_a_verdict_is_drawn_from_its_data_and_its_stored_page_is_shut_in(reader: TestClient, story: Story) -> None:
    page = reader.get(f"/gate/{story.rejected}").text
    assert "How far the features moved" in page and "something to look at" in page
    assert "Change per suite" in page and "style=" not in page and EVIL not in page
    policy = reader.get(f"/gate/{story.rejected}/report").headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'") and "script-src" not in policy
    assert reader.get(f"/gate/{story.rejected}/data").json()["outcome"] == "rejected"
    for nowhere in ("/gate/update-nowhere", "/gate/..%2f..%2fledger.db/report"):
        assert reader.get(nowhere).status_code == 404


@pytest.mark.parametrize("path", ["/", "/static/console.css", "/nowhere", "/gate/update-naive", "/samples/x.png"])
def test_every_answer_carries_the_security_headers(reader: TestClient, path: str) -> None:
    headers = reader.get(path).headers
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == ("max-age=300" if path.startswith("/static") else "no-store")


# In public


def public(home: Path, **console: object) -> TestClient:
    return TestClient(build_console(settings(home, public=True, **console)), base_url=LOCAL, follow_redirects=False)


@pytest.fixture
def screen(home: Path, story: Story) -> Iterator[TestClient]:
    with public(home) as client:
        yield client


@pytest.mark.parametrize("page", OPEN)
def test_a_public_page_is_shown_without_a_key_a_form_or_a_secret_and_asks_again(screen: TestClient, page: str) -> None:
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


def test_what_happened_is_shown_and_what_needs_a_key_is_not_there(screen: TestClient, story: Story) -> None:
    timeline, stream = text(screen, "/releases"), text(screen, "/stream")
    for fact in ("Release 3", "an operator", "update passed", "Updates are on hold", "4 of 40 inputs agree"):
        assert fact in timeline
    assert "1 waiting" in stream and "cats" in stream
    verdict = f"/gate/{story.rejected}"
    for page in (*(set(PAGES) - set(OPEN)), f"{verdict}/report", f"{verdict}/data", PICTURE):
        assert screen.get(page).status_code == 404, page
    overview = screen.get("/").text
    assert "tour.js" not in overview and 'id="tour"' not in overview


def test_every_route_that_posts_refuses(home: Path, screen: TestClient) -> None:
    whole = build_console(settings(home))
    posts = [route for route in whole.routes if isinstance(route, APIRoute) and "POST" in route.methods]
    assert len(posts) >= 8
    ledger = Ledger.open(settings(home).ledger)
    before = (ledger.live(), len(ledger.audit_rows(500)))
    key = settings(home).operator_key().get_secret_value()
    form = {"reason": "x", "expected_live": "3", "key": key, "text": "x", "action": "x", "left": "1", "right": "2"}
    for route in posts:
        path = route.path.format(action="rollback", place="samples:0:0", feedback_id="0" * 64)
        answer = screen.post(path, data=form, headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.text) == (403, "this console is public and read-only."), path
    for method in ("PUT", "DELETE", "PATCH"):
        assert screen.request(method, "/releases").status_code == 403
    for action in ("rollback", "release", "promote", "hold", "resume"):
        answer = screen.get(f"/releases/{action}")
        assert answer.status_code == 403 and "read-only" in answer.text and "<form" not in answer.text
    assert (ledger.live(), len(ledger.audit_rows(500))) == before
    ledger.close()


def test_a_session_of_an_operator_counts_for_nothing(home: Path, story: Story, screen: TestClient) -> None:
    with TestClient(build_console(settings(home)), base_url=LOCAL, follow_redirects=False) as other:
        signed_in(other, settings(home).operator_key().get_secret_value())
        screen.cookies = other.cookies
    answer = screen.get("/releases")
    assert "Roll back" not in answer.text and "set-cookie" not in answer.headers


def test_a_verdict_is_shown_without_its_samples_unless_the_setting_says_so(home: Path, story: Story) -> None:
    with public(home) as screen:
        page = text(screen, f"/gate/{story.rejected}")
    assert "Change per suite" in page and "now first" not in page and "/samples/" not in page
    with public(home, public_samples=True) as screen:
        page = screen.get(f"/gate/{story.rejected}").text
        assert "now first" in page and EVIL not in page
        assert screen.get(PICTURE).status_code == 200


def test_an_address_that_asks_too_often_has_to_wait(home: Path, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
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
    controller = {"started": True, "trouble": "postgres://db", "resident": []}
    status = {"controller": controller, "vlm_problem": "/srv/model", "catalog": {"spaces": {}}}
    assert problems(status, public=True) == [
        "The last release could not be made.", "Questions about pictures are not answered yet.",
    ]  # fmt: skip


class Pages:
    """Records how often it was asked, and with which key."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails = False
        self.shared = SharedPages(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        assert await request.body() == b""
        self.calls.append((request.url.path, scope["state"]["session"].key))
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("the ledger is away")
        await PlainTextResponse(f"answer {len(self.calls)}", headers={"x-page": scope["path"]})(scope, receive, send)

    def visitor(self) -> httpx.AsyncClient:
        """Who asks with the session of an operator."""

        async def with_session(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"session": Session.new("of an operator")}
            await self.shared(scope, receive, send)

        return httpx.AsyncClient(transport=httpx.ASGITransport(with_session), base_url="http://screen")


async def test_visitors_share_an_answer_that_was_made_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    async with pages.visitor() as screen:
        answers = await asyncio.gather(*(screen.get("/gate") for _ in range(20)))
        assert {answer.text for answer in answers} == {"answer 1"} and answers[-1].headers["x-page"] == "/gate"
        assert pages.calls == [("/gate", "")]
        for url, headers in (("/", {}), ("/gate?page=2", {}), ("/gate", {"hx-request": "true"})):
            await screen.get(url, headers=headers)
        assert len(pages.calls) == 4, "another page, and a part of it"
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + SHARED_SECONDS)
        assert (await screen.get("/gate")).text == "answer 5", "later"


async def test_a_failure_and_a_probe_are_not_shared_and_few_answers_are_kept() -> None:
    pages = Pages()
    async with pages.visitor() as screen:
        pages.fails = True
        with pytest.raises(OSError, match="away"):
            await screen.get("/")
        pages.fails = False
        for url, text in (("/", "answer 2"), ("/health/live", "answer 3"), ("/health/live", "answer 4")):
            assert (await screen.get(url)).text == text
        for number in range(MOST_SHARED + 10):
            await screen.get(f"/?{number}")
    assert len(pages.shared._answers) == MOST_SHARED
