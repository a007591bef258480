"""The review of corrections, by keyboard alone in a real browser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from core.addresses import free_port
from core.ledger import Ledger
from core.ledger.rows import FeedbackRow, utc_now
from core.settings import Settings
from tests.support.browser import DESKTOP, PHONE, Complaints, signed_in, violations, width
from tests.support.console_server import console_server
from tests.support.story import EVIL

LABELS = ("bus", "消防车", "سيارة إطفاء", EVIL, "café 🚒")


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 32), kind: str = "PNG", colour: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


PICTURES = (
    picture(colour="red"), picture(size=(1, 1)), picture(size=(8, 2000)), picture("RGBA", (300, 200), colour=0),
    picture("P", kind="GIF"),
)  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger.open(Settings(home=tmp_path).ledger)) as ledger:
        for number, (label, image) in enumerate(zip(LABELS, PICTURES, strict=True)):
            ledger.record_feedback(FeedbackRow(
                id=f"{number:08x}" * 8, caller=f"app {EVIL}", release=3, route="classify", input="", verdict="correct",
                answered_at=utc_now(), detail={"label": label, "comment": EVIL}, state="waiting", image=image,
            ))  # fmt: skip
        yield ledger


@pytest.fixture
def ana(browser: Browser, ledger: Ledger, tmp_path: Path) -> Iterator[Page]:
    settings = Settings(home=tmp_path, console={"port": free_port()}, serve={"port": 1}, base={"vlm": ""})  # type: ignore[arg-type]
    _, key = ledger.create_key("ana", ["search", "operate"], actor="test")
    with console_server(settings) as url:
        page = signed_in(browser, url, key, viewport=DESKTOP)
        complaints = Complaints(page)
        page.goto("/feedback")
        yield page
        page.context.close()
        assert complaints.heard == []


def at(page: Page, number: int) -> None:
    """Wait until a correction is shown large, has the focus, and its picture has come."""
    expect(page.locator("article code")).to_have_text(f"{number:08x}")
    expect(page.locator("article")).to_be_focused()
    expect(page.locator("article > img")).to_have_js_property("complete", True)
    assert page.locator("article > img").evaluate("image => image.naturalWidth") > 0


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_an_operator_reviews_by_keyboard_alone(ana: Page, ledger: Ledger) -> None:
    at(ana, 0)
    for key, number in (("j", 1), ("ArrowRight", 2), ("j", 3), ("j", 4), ("k", 3), ("ArrowLeft", 2), ("k", 1)):
        press(ana, key)
        at(ana, number)
    press(ana, "a")
    at(ana, 2)
    expect(ana.get_by_role("status").first).to_contain_text("Accepted as “消防车”")
    press(ana, "e")
    expect(ana.get_by_label("Right label")).to_be_focused()
    ana.keyboard.type("jd")
    press(ana, "Escape")
    at(ana, 2)
    expect(ana.get_by_label("Right label")).to_have_value(LABELS[2])
    press(ana, "e")
    ana.keyboard.type("пожарная машина <b>")
    press(ana, "Enter")
    at(ana, 3)
    expect(ana.get_by_role("status").first).to_contain_text("Accepted as “пожарная машина <b>”")
    for _ in range(3):
        press(ana, "Tab")
    expect(ana.get_by_label("Reason")).to_be_focused()
    press(ana, "ControlOrMeta+a")
    ana.keyboard.type("a script")
    press(ana, "Escape", "e", "Tab", "Tab")
    expect(ana.get_by_label("Reason")).to_have_value("reviewed in the console")
    press(ana, "ControlOrMeta+a")
    ana.keyboard.type("a script")
    press(ana, "Tab", "Tab", "Enter")
    at(ana, 4)
    expect(ana.get_by_role("status").first).to_contain_text("Dismissed")
    press(ana, "d")
    at(ana, 0)
    press(ana, "j")  # the last one: there is no next
    press(ana, "a")
    expect(ana.get_by_role("main")).to_contain_text("Nothing waits for a review")
    accepted = [row.detail for row in ledger.corrections("accepted")]
    assert [(detail["label"], detail.get("said", {}).get("label")) for detail in accepted] == [
        (LABELS[0], None), (LABELS[1], None), ("пожарная машина <b>", LABELS[2]),
    ]  # fmt: skip
    assert [row.outcome for row in ledger.corrections("dismissed")] == ["a script", "reviewed in the console"]
    assert not any(row.image for row in ledger.corrections("dismissed", images=True))
    noted = [(row.subject[9:17], row.action, row.detail.get("label")) for row in ledger.audit_rows(5, actor="key:ana")]
    assert noted[::-1] == [
        ("00000001", "accept correction", None), ("00000002", "accept correction", "пожарная машина <b>"),
        ("00000003", "dismiss correction", None), ("00000004", "dismiss correction", None),
        ("00000000", "accept correction", None),
    ]  # fmt: skip
    assert ana.title() == "Review · Ratchet"


def test_another_person_is_faster_and_a_report_without_a_label_needs_one(ana: Page, ledger: Ledger) -> None:
    at(ana, 0)
    ledger.review_correction("0" * 8, False, actor="ben", reason="blurred")
    press(ana, "a")
    at(ana, 1)
    expect(ana.get_by_role("status").first).to_contain_text("Another person was faster: it is dismissed")
    expect(ana.get_by_role("status").first).to_contain_text("ben: “blurred”")
    press(ana, "e", "Backspace", "Escape", "e", "Backspace", "Enter")
    expect(ana.get_by_role("alert").first).to_contain_text("says neither a label nor a text")
    expect(ana.get_by_label("Right label")).to_be_focused()
    ana.keyboard.type("van")
    press(ana, "Enter")
    at(ana, 2)
    assert [row.detail["label"] for row in ledger.corrections("accepted")] == ["van"]


def test_axe_finds_nothing_and_it_fits_a_phone(ana: Page, ledger: Ledger) -> None:
    for number in range(len(LABELS)):
        at(ana, number)
        assert (violations(ana), width(ana)) == ([], PHONE["width"])
        ana.set_viewport_size(DESKTOP)
        press(ana, "j")
