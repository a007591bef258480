"""Take pictures of the console at three moments of a demo, in light and dark, on a desktop and on a phone.

    ratchet demo --keep &
    python -m tests.e2e.screenshots --home .ratchet/demo --out docs/images/console

It starts its own console next to the demo and waits for each moment: before the first update, after a rejected update,
and when an update is live. ``--now NAME`` takes all pages under that name without waiting; ``--public NAME`` does the
same in public mode. ``--story`` takes the page that a demo left behind and needs no running demo.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from core.addresses import free_port
from core.ledger import Ledger
from core.loading import load_settings
from core.waiting import wait_until
from tests.support.browser import PHONE, chromium, console

PATIENCE_SECONDS = 1800.0
COLOURS = 256
"""Enough colours for a picture of a page, at a third of the bytes."""
SIZES = {"desktop": {"width": 1440, "height": 900}, "phone": PHONE}
SCHEMES = ("light", "dark")


def playground(page: Page) -> None:
    page.goto("/playground")
    _press(page, "Search", "#found .hits li", "Find pictures with words", "a red heart")
    _press(page, "Compare", "#sorted .shares li")
    if page.get_by_label("Question").count():
        _press(page, "Ask", "#talk .turn", "Question", "what is this?")
    page.evaluate("scrollTo(0, 0)")


def gate(page: Page) -> None:
    """The newest verdict, or the list if there is none."""
    page.goto("/gate")
    newest = page.locator(".verdicts h2 a")
    if newest.count():
        newest.first.click()
        page.locator(".verdict").wait_for()


def compare(page: Page) -> None:
    page.goto("/compare")
    if page.get_by_role("button", name="Ask both").count():
        _press(page, "Ask both", "#compared .card", "Words", "a red heart")
        page.locator("#compared").scroll_into_view_if_needed()


def rollback(page: Page) -> None:
    page.goto("/releases")
    page.get_by_role("button", name="Roll back…").first.click()
    page.locator("#dialog[open]").wait_for()


def tour(page: Page) -> None:
    page.goto("/?tour")
    for _ in range(2):
        page.get_by_role("button", name="Next", exact=True).click()


VISITS: dict[str, Callable[[Page], object]] = {
    "overview": lambda page: page.goto("/"),
    **{name: partial(Page.goto, url=f"/{name}") for name in (
        "releases", "models", "stream", "budget", "quarantine", "audit")},
    "playground": playground, "gate": gate, "compare": compare, "rollback": rollback, "tour": tour,
}  # fmt: skip
MOMENTS: dict[str, tuple[Callable[[Ledger], bool], str]] = {
    "before": (lambda ledger: ledger.live() is not None, "overview playground"),
    "rejected": (lambda ledger: any(v.outcome == "rejected" for v in ledger.verdicts()), "overview gate"),
    "live": (
        lambda ledger: any(row.actor == "updater" for row in ledger.releases()) and not ledger.pending_proposals(),
        "overview releases gate compare budget rollback",
    ),
}
PUBLIC = "overview releases models gate stream budget"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--home", type=Path, required=True, help="Home folder of the running demo.")
    flags.add_argument("--out", type=Path, required=True, help="Folder of the pictures.")
    flags.add_argument("--now", help="Take all pages at once, under this name.")
    flags.add_argument("--public", help="Take the pages of the public mode at once, under this name.")
    flags.add_argument("--pages", nargs="*", help="Only these pages.")
    flags.add_argument("--story", action="store_true", help="Take the demo's page instead.")
    asked = flags.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.story:
        with chromium() as browser:
            take_story(browser, asked.home / "demo.html", asked.out)
        return
    settings = load_settings(asked.home / "ratchet.yaml", {"console.port": free_port()}, environ={})
    url = settings.console.url
    own = asked.out / ".ratchet-console.yaml"
    of_demo = yaml.safe_load((asked.home / "ratchet.yaml").read_text())
    shown = {"port": settings.console.port, "public": bool(asked.public)}
    own.write_text(yaml.safe_dump({**of_demo, "console": shown}))
    try:
        with console(own, url, asked.out / ".console.log"), chromium() as browser:
            ledger = Ledger.open(settings.ledger)
            moments = MOMENTS
            if now := asked.now or asked.public:
                moments = {now: (lambda _: True, PUBLIC if asked.public else " ".join(VISITS))}
            for moment, (came, pages) in moments.items():
                _await(ledger, came, moment)
                chosen = [page for page in pages.split() if not asked.pages or page in asked.pages]
                key = "" if asked.public else settings.operator_key().get_secret_value()
                take(browser, url, key, chosen, asked.out, moment)
    finally:
        own.unlink()
        (asked.out / ".console.log").unlink(missing_ok=True)


def take(browser: Browser, url: str, key: str, pages: list[str], out: Path, moment: str) -> None:
    """Take each page in both schemes and both sizes, signed in with ``key`` if that is not empty."""
    for size, viewport in SIZES.items():
        context = browser.new_context(base_url=url, viewport=viewport, reduced_motion="reduce")  # type: ignore[arg-type]
        context.add_init_script("localStorage.setItem('ratchet-tour', 'seen')")
        page = context.new_page()
        if key:
            page.goto("/sign-in")
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Sign in").click()
            page.get_by_role("button", name="Sign out").wait_for()
        for name in pages:
            VISITS[name](page)
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                page.wait_for_load_state("networkidle")
                save(page.screenshot(), out / f"{moment}-{name}-{scheme}-{size}.png")
        context.close()


def take_story(browser: Browser, file: Path, out: Path) -> None:
    for size, scheme, part in (("desktop", "light", 0), ("phone", "dark", 1)):
        page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(file.resolve().as_uri())
        page.locator("section").nth(part).evaluate("(section, part) => part && section.scrollIntoView()", part)
        save(page.screenshot(), out / f"demo-{scheme}-{size}.png")
        page.close()
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(file.resolve().as_uri())
    page.locator("section").first.screenshot(path=out / "searches.png")


def save(picture: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


def _press(page: Page, button: str, result: str, field: str = "", text: str = "") -> None:
    if field:
        page.get_by_label(field, exact=True).fill(text)
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator(result).first).to_be_visible(timeout=60_000)


def _await(ledger: Ledger, came: Callable[[Ledger], bool], moment: str) -> None:
    if not wait_until(lambda: came(ledger), PATIENCE_SECONDS, pause=1.0):
        raise SystemExit(f"the moment {moment!r} did not come within {PATIENCE_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
