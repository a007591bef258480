"""Every action of the console in a real browser, against a real server and a real broker."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from core.addresses import free_port
from demo.story import page as demo_page
from ops.console import public
from ops.console.request_context import NAV
from tests.integration.console.conftest import Place
from tests.support.browser import DESKTOP, PHONE, violations, width
from tests.support.console_server import console_server
from tests.support.kafka import picture, produce, records_seen, wait_for
from tests.support.story import verdict
from tests.unit.demo.test_story import picture as demo_picture
from tests.unit.demo.test_story import story as demo_story
from tests.unit.updater.gate.test_report import DIAGNOSTICS, TRUST
from updater.gate import report

pytestmark = pytest.mark.timeout(300)
PAGES = (*(link for link, _ in NAV), "/audit/deletions", "/tour", "/sign-in")


def open_dialog(page: Page, words: str) -> None:
    page.get_by_role("button", name=words, exact=True).first.click()
    page.locator("#dialog[open]").wait_for()


def confirm(page: Page, reason: str, verb: str) -> None:
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reason").fill(reason)
    dialog.get_by_role("button", name=verb, exact=True).click()


def said(page: Page, words: str) -> None:
    expect(page.get_by_role("dialog")).to_contain_text(words, timeout=30_000)


def releases(place: Place, count: int) -> list[str]:
    names = [place.server.adapter() for _ in range(count)]
    with place.server.client() as client:
        for name in names:
            client.release(name, reason="made for the test")
    return names


def test_a_visitor_looks_without_a_key_and_is_asked_for_one_before_he_acts(visitor: Page, place: Place) -> None:
    visitor.goto("/releases")
    visitor.get_by_role("button", name="Roll back…").click()
    expect(visitor).to_have_url(re.compile("/sign-in"))
    visitor.get_by_label("API key").fill("rk_00000000_" + "0" * 64)
    visitor.get_by_role("button", name="Sign in").click()
    expect(visitor.get_by_role("alert").first).to_contain_text("not known here")
    visitor.get_by_label("API key").fill(place.operator)
    visitor.get_by_role("button", name="Sign in").click()
    expect(visitor.get_by_text("may act")).to_be_visible()
    expect(visitor.get_by_role("heading", name="Releases", exact=True)).to_be_visible()
    (cookie,) = visitor.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert place.operator not in cookie["value"]
    visitor.get_by_role("button", name="Sign out").click()
    expect(visitor.get_by_role("link", name="Sign in")).to_be_visible()


def test_the_tour_of_a_first_visit_goes_by_keyboard_and_is_not_shown_again(visitor: Page) -> None:
    visitor.goto("/")
    tour = visitor.get_by_role("dialog", name="Is it healthy?")
    expect(tour).to_be_visible()
    expect(visitor.locator("#tour-health")).to_have_class(re.compile("toured"))
    expect(visitor.locator(":focus")).to_have_id("tour-title")
    visitor.keyboard.press("Tab")
    visitor.keyboard.press("Enter")
    expect(visitor.get_by_role("dialog", name="What is live?")).to_be_visible()
    expect(visitor.locator(".toured")).to_have_id("tour-live")
    assert violations(visitor) == []
    visitor.keyboard.press("Escape")
    expect(visitor.get_by_role("dialog")).to_have_count(0)
    expect(visitor.locator(".toured")).to_have_count(0)
    visitor.reload()
    expect(visitor.get_by_role("heading", name="Overview")).to_be_visible()
    expect(visitor.get_by_role("dialog")).to_have_count(0)
    visitor.get_by_role("link", name="Tour", exact=True).click()
    visitor.get_by_role("link", name="Show it on the Overview").click()
    for title in ("Is it healthy?", "What is live?", "Is it learning?"):
        expect(visitor.get_by_role("dialog", name=title)).to_be_visible()
        visitor.get_by_role("button", name="Next", exact=True).click()
    visitor.get_by_role("button", name="Skip the tour").click()
    expect(visitor.get_by_role("dialog")).to_have_count(0)


def test_a_public_screen_shows_what_comes_and_has_nothing_to_press_but_pause(visitor: Page, place: Place) -> None:
    own = place.settings.console.model_copy(update={"port": free_port(), "public": True})
    with console_server(place.settings.model_copy(update={"console": own})) as url:
        for path in public.PAGES:
            visitor.goto(f"{url}{path}")
            assert visitor.get_by_role("button").all_inner_texts() == ["Pause updates"], path
            assert violations(visitor) == [], path
        visitor.goto(f"{url}/")
        expect(visitor.get_by_role("dialog")).to_have_count(0)
        releases(place, 1)
        expect(visitor.locator("#main")).to_contain_text(f"Release {place.live}", timeout=30_000)
        assert visitor.context.cookies(url) == []


def test_an_operator_rolls_back_and_the_log_says_who_and_why(ana: Page, place: Place) -> None:
    first, _ = releases(place, 2)
    ana.goto("/releases")
    open_dialog(ana, "Roll back…")
    said(ana, f"to {first}")
    said(ana, "less than a second")
    confirm(ana, "wrong colours", "Roll back now")
    said(ana, "is live everywhere")
    row = place.server.ledger.live()
    assert row is not None and (row.clip, row.reason) == (first, "wrong colours")
    assert row.actor.startswith("key:ana")
    ana.get_by_role("link", name="Back to the releases").click()
    expect(ana.locator(".is-live")).to_contain_text("wrong colours")
    ana.goto(f"/audit?about=release+{row.number}")
    expect(ana.get_by_role("table")).to_contain_text(row.actor)


def test_of_two_operators_the_second_is_told_and_changes_nothing(ana: Page, place: Place) -> None:
    releases(place, 1)
    ana.goto("/releases")
    open_dialog(ana, "Roll back…")
    with place.server.client(actor="ben") as client:
        made = client.release(place.server.adapter(), reason="Ben was here")
    confirm(ana, "too late", "Roll back now")
    said(ana, "Nothing was changed")
    said(ana, "Ben was here")
    assert place.live == made["number"]
    ana.get_by_role("dialog").get_by_role("button", name="Decide again").click()
    said(ana, f"Release {made['number'] + 1} is made.")


def test_a_first_visitor_finds_sorts_and_asks(visitor: Page, place: Place, tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(picture(77))
    visitor.goto("/playground")
    visitor.get_by_label("Find pictures with words").fill("cats")
    visitor.get_by_role("button", name="Search").click()
    expect(visitor.locator("#found .hits li")).to_have_count(12)
    expect(visitor.locator("#found img").first).to_have_js_property("complete", True)
    visitor.get_by_role("radio").nth(2).check()
    visitor.get_by_role("button", name="Find pictures like it").click()
    expect(visitor.locator("#found-similar .hits li").first).to_contain_text("1.00")
    visitor.locator("input[type=file]").set_input_files(mine)
    visitor.get_by_label("Words, with commas between").fill("boat, tree")
    visitor.get_by_role("button", name="Compare").click()
    expect(visitor.locator("#sorted .shares li")).to_have_count(2)
    visitor.get_by_label("Question").fill("what is this?")
    visitor.get_by_role("button", name="Ask", exact=True).click()
    expect(visitor.locator(".answered")).to_contain_text(f"vlm@{place.live}")
    mine.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    visitor.locator("input[type=file]").set_input_files(mine)
    visitor.get_by_role("button", name="Ask", exact=True).click()
    expect(visitor.locator("#talk")).to_contain_text("This picture cannot be read")


def test_a_refused_record_is_looked_at_and_sent_again(ana: Page, place: Place) -> None:
    evil = "<script>document.title = 'stolen'</script>"
    seen = records_seen(place.ingest.status)
    produce(place.settings.kafka, [(picture(5), [("ratchet_domain", evil.encode())])], partition=0)
    wait_for(lambda: records_seen(place.ingest.status) > seen, "the refusal")
    ana.goto("/quarantine")
    card = ana.locator(".refused .card").first
    expect(card).to_contain_text("There is no text")
    expect(card.locator("img")).to_have_js_property("naturalWidth", 32)
    card.get_by_role("button").click()
    said(ana, evil)
    confirm(ana, "the rule was too strict", "Send it again")
    said(ana, "The broker has it")
    wait_for(lambda: records_seen(place.ingest.status) > seen + 1, "the record again")
    (row,) = [row for row in place.server.ledger.audit_rows() if row.action == "resubmit"]
    assert row.actor == "key:ana" and row.detail["reason"] == "the rule was too strict"
    ana.goto("/quarantine")
    card = ana.locator(".refused .card", has_text="sent again")
    card.get_by_role("button").click()
    expect(ana.get_by_role("dialog").get_by_label("although it was sent before")).to_be_visible()
    assert ana.title() == "Quarantine · Ratchet"


def test_a_verdict_is_drawn_and_captions_in_it_stay_captions(visitor: Page, place: Place) -> None:
    visitor.goto("/gate")
    visitor.get_by_role("link", name="Rejected").click()
    expect(visitor.get_by_role("img", name="Difference of every suite")).to_be_visible()
    expect(visitor.get_by_role("main")).to_contain_text("emoji_retrieval")
    expect(visitor.get_by_role("main")).to_contain_text("<script>")
    assert "Verdict" in visitor.title()
    link = visitor.get_by_role("link", name="Report as one page").get_attribute("href")
    answer = visitor.goto(link or "")
    assert answer is not None and answer.headers["content-security-policy"].startswith("sandbox;")
    assert visitor.evaluate("origin") == "null"
    assert visitor.title().startswith("Rejected")


def test_axe_finds_nothing_and_every_page_fits_a_phone(ana: Page, place: Place) -> None:
    for path in (f"/gate/{place.story.rejected}", *PAGES, "/releases/rollback"):
        ana.set_viewport_size(DESKTOP)
        ana.goto(path)
        assert (path, violations(ana), width(ana)) == (path, [], PHONE["width"])


def test_axe_finds_nothing_in_pages_that_are_files_and_they_fit_a_phone(visitor: Page, tmp_path: Path) -> None:
    """Reports with every section, and the demo's page."""
    made = {
        outcome: replace(verdict("clip-0123456789ab", lost, won), diagnostics=DIAGNOSTICS, trust=TRUST)
        for outcome, lost, won in (("passed", 4, 80), ("inconclusive", 12, 60), ("rejected", 90, 60))
    }
    assert {outcome: each.outcome for outcome, each in made.items()} == {outcome: outcome for outcome in made}
    pages = {outcome: report.render(each.to_json()) for outcome, each in made.items()}
    for name, content in {**pages, "demo": demo_page.render(demo_story(tmp_path), demo_picture, tmp_path)}.items():
        visitor.set_viewport_size(DESKTOP)
        visitor.set_content(content)
        assert (name, violations(visitor), width(visitor)) == (name, [], PHONE["width"])


@pytest.mark.long
def test_the_page_of_the_api_loads_nothing_from_elsewhere_and_calls_the_server(visitor: Page, place: Place) -> None:
    asked: list[str] = []
    visitor.on("request", lambda request: asked.append(request.url))
    visitor.goto(f"{place.server.url}/docs")
    visitor.locator(".opblock-summary", has_text="Models that requests may name").click()
    visitor.get_by_role("button", name="Try it out").click()
    visitor.get_by_role("button", name="Execute").click()
    expect(visitor.locator(".live-responses-table tbody .response-col_status")).to_contain_text("200")
    elsewhere = [url for url in asked if not url.startswith((f"{place.server.url}/", "data:"))]
    assert elsewhere == [] and f"{place.server.url}/v1/models" in asked
