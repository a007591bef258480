"""A real Chromium (Debian's), and a console process for it to visit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.downloads import answers, running

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
START_SECONDS = 120.0


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


class Complaints:
    """Errors that a browser reports of a page: failing scripts and violations of the page's policy."""

    def __init__(self, page: Page) -> None:
        self.heard: list[str] = []
        page.on("pageerror", lambda error: self.heard.append(str(error)))
        page.on("console", lambda message: self._hear(message.text))

    def _hear(self, text: str) -> None:
        if "Content Security Policy" in text or "Content-Security-Policy" in text:
            self.heard.append(text)


def serious(findings: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{found['id']}: {found['help']}: {[node['target'] for node in found['nodes']][:5]}"
        for found in findings
        if found["impact"] in ("serious", "critical")
    ]
