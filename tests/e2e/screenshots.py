"""Take the documentation's pictures of the console at two moments of a demo, and of the page that a demo leaves.

    ratchet demo --keep &
    python -m tests.e2e.screenshots --home .ratchet/demo --out docs/images/console
    python -m tests.e2e.screenshots --home .ratchet/demo --out docs/images --story

It starts its own console next to the demo and waits for each moment: after a rejected update, and when an update is
live. ``--story`` takes the searches of the page that a demo left behind and needs no running demo.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize

from core.addresses import free_port
from core.ledger import Ledger
from core.loading import load_settings
from core.waiting import wait_until
from tests.support.browser import PHONE, chromium, console, signed_in

PATIENCE_SECONDS = 1800.0
COLOURS = 256
"""Enough colours for a picture of a page, at a third of the bytes."""
DESKTOP: ViewportSize = {"width": 1440, "height": 900}


def rollback(page: Page) -> None:
    page.goto("/releases")
    page.get_by_role("button", name="Roll back…").first.click()
    page.locator("#dialog[open]").wait_for()


def tour(page: Page) -> None:
    page.goto("/?tour")
    for _ in range(2):
        page.get_by_role("button", name="Next", exact=True).click()


def rejected(ledger: Ledger) -> bool:
    return any(verdict.outcome == "rejected" for verdict in ledger.verdicts())


def live(ledger: Ledger) -> bool:
    return any(row.actor == "updater" for row in ledger.releases()) and not ledger.pending_proposals()


class Picture(NamedTuple):
    name: str
    moment: Callable[[Ledger], bool]
    visit: Callable[[Page], object]
    scheme: str = "light"
    viewport: ViewportSize = DESKTOP


PICTURES = (
    Picture("rejected-overview-light-desktop", rejected, lambda page: page.goto("/")),
    Picture("live-rollback-dark-desktop", live, rollback, "dark"),
    Picture("stream-light-desktop", live, lambda page: page.goto("/stream")),
    Picture("tour-dark-phone", live, tour, "dark", PHONE),
)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--home", type=Path, required=True, help="Home folder of the demo.")
    flags.add_argument("--out", type=Path, required=True, help="Folder of the pictures.")
    flags.add_argument("--story", action="store_true", help="Take the demo's page instead.")
    asked = flags.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        if asked.story:
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.goto((asked.home / "demo.html").resolve().as_uri())
            save(page.locator("section").first.screenshot(), asked.out / "searches.png")
        else:
            take_all(browser, asked.home, asked.out)


def take_all(browser: Browser, home: Path, out: Path) -> None:
    settings = load_settings(home / "ratchet.yaml", {"console.port": free_port()}, environ={})
    own, log = out / ".ratchet-console.yaml", out / ".console.log"
    of_demo = yaml.safe_load((home / "ratchet.yaml").read_text())
    own.write_text(yaml.safe_dump({**of_demo, "console": {"port": settings.console.port}}))
    ledger = Ledger.open(settings.ledger)
    try:
        with console(own, settings.console.url, log):
            for picture in PICTURES:
                if not wait_until(lambda picture=picture: picture.moment(ledger), PATIENCE_SECONDS, pause=1.0):
                    raise SystemExit(f"{picture.name} did not come within {PATIENCE_SECONDS:.0f} s")
                take(browser, settings.console.url, settings.operator_key().get_secret_value(), picture, out)
    finally:
        own.unlink()
        log.unlink(missing_ok=True)


def take(browser: Browser, url: str, key: str, picture: Picture, out: Path) -> None:
    page = signed_in(browser, url, key, viewport=picture.viewport, color_scheme=picture.scheme)
    picture.visit(page)
    page.wait_for_load_state("networkidle")
    save(page.screenshot(), out / f"{picture.name}.png")
    page.context.close()


def save(picture: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", flush=True)


if __name__ == "__main__":
    main()
