from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from ops.console.app import build_console
from ops.console.request_context import NAV
from tests.support.story import EVIL, Story, tell
from tests.unit.ops.console.conftest import LOCAL, csrf, settings

PAGES = (*(link for link, _ in NAV), "/audit/deletions", "/tour", "/sign-in")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    made = tell(settings(home), home / "made")
    ledger = Ledger.open(settings(home).ledger)
    ledger.commit_release(1, clip=None, vlm=None, actor="controller", reason="first start", proposal_id=None)
    wish = ledger.propose("update", clip=made.adapter, actor="updater", reason="passed", update_id=made.passed)
    ledger.commit_release(2, clip=made.adapter, vlm=None, actor="updater", reason=EVIL, proposal_id=wish.id)
    ledger.close()
    return made


@pytest.fixture(scope="module")
def visitor(home: Path, story: Story) -> Iterator[TestClient]:
    with TestClient(build_console(settings(home)), base_url=LOCAL, follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_without_a_server(visitor: TestClient, page: str) -> None:
    answer = visitor.get(page)
    assert answer.status_code == 200, answer.text
    assert "<h1>" in answer.text
    assert "<script>" not in answer.text and "style=" not in answer.text, "the policy forbids both"
    assert "<img src=x" not in answer.text and (page not in ("/releases", "/audit") or "&lt;script&gt;" in answer.text)


def test_pages_tell_the_story_of_the_ledger(visitor: TestClient, story: Story) -> None:
    timeline = visitor.get("/releases").text
    assert "Release 2" in timeline and story.adapter in timeline and "812 records" in timeline
    verdicts = visitor.get("/gate").text
    assert "Rejected" in verdicts and "Passed" in verdicts and "Warning: something to look at" in verdicts
    for now in (verdicts, visitor.get("/overview/now").text):
        assert "0 of " in now and "fresh items before the next verdict" in " ".join(re.sub("<[^>]+>", "", now).split())
    assert "alpha 0.05 for gains until the next release" in verdicts
    overview = visitor.get("/overview/now").text
    assert "Release 2" in overview
    assert visitor.get("/audit?about=release+2&actor=updater").text.count("<tr>") == 2
    assert "No row fits" in visitor.get("/audit?actor=nobody").text


def test_what_is_away_is_said_where_it_is_missed(visitor: TestClient) -> None:
    for page in ("/", "/playground", "/compare", "/releases"):
        assert "model server does not answer" in visitor.get(page).text
    answer = visitor.post("/playground/search", data={"text": "a cat"}, headers={"x-csrf-token": csrf(visitor)})
    assert answer.status_code == 502 and "does not answer" in answer.text


def test_a_verdict_is_drawn_from_its_data_and_its_stored_page_is_shut_in(visitor: TestClient, story: Story) -> None:
    page = visitor.get(f"/gate/{story.rejected}")
    assert "How far the features moved" in page.text and "something to look at" in page.text
    assert "Change per suite" in page.text and "style=" not in page.text and EVIL not in page.text
    stored = visitor.get(f"/gate/{story.rejected}/report")
    assert stored.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert "script-src" not in stored.headers["content-security-policy"]
    assert visitor.get(f"/gate/{story.rejected}/data").json()["outcome"] == "rejected"
    assert visitor.get("/gate/update-nowhere").status_code == 404
    assert visitor.get("/gate/..%2f..%2fledger.db/report").status_code == 404


@pytest.mark.parametrize("path", ["/", "/static/console.css", "/nowhere", "/gate/update-naive", "/samples/x.png"])
def test_every_answer_carries_the_security_headers(visitor: TestClient, path: str) -> None:
    headers = visitor.get(path).headers
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == ("max-age=300" if path.startswith("/static") else "no-store")


def test_each_step_of_the_tour_points_to_a_part_of_the_overview_and_leads_to_a_page(visitor: TestClient) -> None:
    page, tour = visitor.get("/").text, visitor.get("/tour").text
    part = visitor.get("/overview/now", headers={"hx-request": "true"}).text
    targets = re.findall(r'data-target="([^"]+)"', page)
    assert len(targets) == 7 and 'href="/tour"' in page
    for target in targets:
        assert page.count(f'id="{target}"') == 1, target
        assert target.startswith("nav-") or f'id="{target}"' in part, "the part that asks again has it, too"
    links = re.findall(r'<p><a href="([^"]+)">To the page', tour)
    assert len(links) == 7 and set(links) <= set(PAGES)
