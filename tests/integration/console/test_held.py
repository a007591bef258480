"""Held samples, accepted by keyboard in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from core.addresses import free_port
from core.ledger import Ledger
from core.settings import Settings
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.browser import DESKTOP, PHONE, Complaints, signed_in, violations, width
from tests.support.console_server import console_server
from tests.support.inputs import pictures
from tests.support.samples import TOPIC, sample
from tests.support.story import EVIL


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    store = SampleStore(Settings(home=tmp_path).lake)
    rows = [
        sample(0, number, image=image, text=f"{number} {EVIL}", source=f"shop {EVIL}", domain="d", split="held_train",
               reason="held_agreement", detail="image and text agree by 0.1")
        for number, image in enumerate(pictures(5))
    ]  # fmt: skip
    store.put(rows, [Position(TOPIC, 0, 5)])
    return store


@pytest.fixture
def ana(browser: Browser, store: SampleStore, tmp_path: Path) -> Iterator[Page]:
    settings = Settings(home=tmp_path, console={"port": free_port()}, serve={"port": 1}, base={"vlm": ""})  # type: ignore[arg-type]
    with closing(Ledger.open(settings.ledger)) as ledger:
        _, key = ledger.create_key("ana", ["search", "operate"], actor="test")
        ledger.distrust(f"cam {EVIL}", actor="updater", reason="passed without it")
    with console_server(settings) as url:
        page = signed_in(browser, url, key, viewport=DESKTOP)
        complaints = Complaints(page)
        page.goto("/held")
        yield page
        page.context.close()
        assert complaints.heard == []


def card(page: Page, number: int) -> Locator:
    return page.locator("#held li").filter(has_text=f"{number} <script>")


def test_an_operator_accepts_by_keyboard_and_the_focus_goes_on(ana: Page, store: SampleStore) -> None:
    ana.keyboard.press("j")
    expect(card(ana, 4)).to_be_focused()
    ana.keyboard.press("j")
    ana.keyboard.press("a")
    expect(ana.get_by_role("status").first).to_contain_text("1 sample is accepted")
    expect(card(ana, 3)).to_have_count(0)
    expect(card(ana, 2)).to_be_focused()
    ana.keyboard.press("k")
    expect(card(ana, 4)).to_be_focused()
    ana.keyboard.press("Tab")
    ana.keyboard.press("Space")
    card(ana, 0).get_by_role("checkbox").check()
    ana.get_by_label("Reason, for the audit log").fill("a j k")
    ana.keyboard.press("Enter")
    expect(ana.get_by_role("status").first).to_contain_text("2 samples are accepted")
    expect(ana.locator("#held li")).to_have_count(2)
    assert (store.tally()["train"], store.tally()["held_train"]) == (3, 2)
    ana.get_by_label("Reason", exact=True).first.fill("repaired")
    ana.get_by_role("button", name="Trust again").click()
    expect(ana.get_by_role("main")).to_contain_text("All sources are trusted")
    ana.get_by_label("Source", exact=True).last.fill("shop")
    ana.get_by_label("Reason", exact=True).last.fill("swapped")
    ana.get_by_role("button", name="Distrust", exact=True).click()
    expect(ana.get_by_role("status").first).to_contain_text("shop is distrusted")
    assert ana.title() == "Held · Ratchet"


def test_axe_finds_nothing_and_it_fits_a_phone(ana: Page) -> None:
    expect(card(ana, 0)).to_be_visible()
    assert (violations(ana), width(ana)) == ([], PHONE["width"])
