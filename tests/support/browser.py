"""A real Chromium (Debian's), and a console process for it to visit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from tests.support.downloads import answers, running

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}
START_SECONDS = 120.0
AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
"""axe's tags of WCAG 2.1's levels A and AA."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed Chromium; none is ever downloaded."""
    found = shutil.which("chromium")
    assert found is not None, "Chromium is missing: tests/packages.sh installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def console(config: Path, url: str, log: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "ops.cli.main", "--config", str(config), "console"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with running(command, log, lambda: answers(f"{url}/health/live"), START_SECONDS, env=environ, cwd=ROOT):
        yield url


def signed_in(browser: Browser, url: str, key: str, **look: Any) -> Page:
    """The console, signed in and with the tour seen. ``look``: options of the browser's context."""
    context = browser.new_context(base_url=url, reduced_motion="reduce", **look)
    context.add_init_script("localStorage.setItem('ratchet-tour', 'seen')")
    page = context.new_page()
    page.goto("/sign-in")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()
    return page


class Complaints:
    """Errors that a browser reports of a page: failing scripts and violations of the page's policy."""

    def __init__(self, page: Page) -> None:
        self.heard: list[str] = []
        page.on("pageerror", lambda error: self.heard.append(str(error)))
        page.on("console", lambda message: self._hear(message.text))

    def _hear(self, text: str) -> None:
        if "Content Security Policy" in text or "Content-Security-Policy" in text:
            self.heard.append(text)


def violations(page: Page) -> list[str]:
    """Violations of WCAG 2.1 at AA that axe finds, in light colours, and of contrasts in dark ones."""
    found = []
    for scheme, rules in (
        ("light", {"type": "tag", "values": AA}),
        ("dark", {"type": "rule", "values": ["color-contrast"]}),
    ):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        answer = Axe().run(page, options={"resultTypes": ["violations"], "runOnly": rules})
        found += [
            f"{scheme}: {each['id']}: {each['help']}: {[node['target'] for node in each['nodes']][:5]}"
            for each in answer.response["violations"]
        ]
    return found


def width(page: Page) -> int:
    """Pixels that a page takes on a phone: more than the phone's, and it scrolls sideways."""
    page.set_viewport_size(PHONE)
    return int(page.evaluate("document.scrollingElement.scrollWidth"))
