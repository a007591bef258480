"""Record a demo as the README's moving picture: its terminal, and the console on a phone, at the end of each chapter;
then the searches of the page that it leaves.

    uv pip install pyte                   # a terminal in memory
    python -m tests.e2e.recording --home .ratchet/demo --out docs/images/story.webp -- ratchet demo
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page

from core.loading import load_settings
from core.waiting import wait_until
from tests.support.browser import chromium, signed_in

COLUMNS, LINES = 104, 30
FRAME = {"width": 1280, "height": 620}
PHONE = {"width": 400, "height": 620}
EVERY_SECONDS = 5.0
SHOWN_MS = 3500
QUALITY = 60
NOW = re.compile(r"▸\s+(\d+)  ")
CONSOLE = re.compile(r"console (http://[\d.:]+)")
PAGE = """<!doctype html><style>
body {{ margin: 0; display: flex; background: #16161d; }}
pre {{ margin: 12px; flex: 1; color: #d8d8e0; font: 13px/19px "DejaVu Sans Mono", monospace; }}
b {{ color: white; }} .green {{ color: #7ac77a; }} .brown, .yellow {{ color: #e0b84f; }} .red {{ color: #f08080; }}
img {{ width: 400px; height: 620px; object-fit: cover; object-position: top; }}
</style><pre>{terminal}</pre>{console}"""


@dataclass(frozen=True)
class Moment:
    chapter: str
    terminal: str
    console: bytes | None


class Terminal:
    """A command in a terminal of its own, and what that shows."""

    def __init__(self, command: Sequence[str]) -> None:
        import pyte  # type: ignore[import-not-found]

        self.screen: Any = pyte.Screen(COLUMNS, LINES)
        self.lock = Lock()
        self.ended = False
        self._stream: Any = pyte.ByteStream(self.screen)
        pid, self._file = pty.fork()
        if pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
            os.execvp(command[0], list(command))
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self._pid = pid
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._file, 65536)
            except OSError:  # Linux says so when the last process of the terminal has ended
                data = b""
            if not data:
                break
            with self.lock:
                self._stream.feed(data)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self.ended = True

    def text(self) -> str:
        with self.lock:
            return "\n".join(self.screen.display)

    def html(self) -> str:
        with self.lock:
            return "\n".join("".join(map(_html, _runs(self.screen.buffer[line]))) for line in range(LINES))


def _runs(line: Any) -> list[tuple[str, str, bool]]:
    runs: list[tuple[str, str, bool]] = []
    for column in range(COLUMNS):
        char = line[column]
        if runs and runs[-1][1:] == (char.fg, char.bold):
            runs[-1] = (runs[-1][0] + char.data, *runs[-1][1:])
        else:
            runs.append((char.data, char.fg, char.bold))
    return runs


def _html(run: tuple[str, str, bool]) -> str:
    text, colour, bold = run
    inner = f"<b>{escape(text)}</b>" if bold else escape(text)
    return inner if colour == "default" else f'<span class="{escape(colour)}">{inner}</span>'


def record(terminal: Terminal, browser: Browser, home: Path) -> list[Moment]:
    """The last look at each chapter."""
    moments: dict[str, Moment] = {}
    page: Page | None = None
    looked = 0.0
    while not wait_until(lambda: terminal.ended, 0.2):
        text = terminal.text()
        chapter, address = NOW.search(text), CONSOLE.search(text)
        if chapter is None or time.monotonic() - looked < EVERY_SECONDS:
            continue
        looked = time.monotonic()
        picture = None
        if address is not None:
            try:
                page = page or signed_in(browser, address[1], _key(home), viewport=PHONE, color_scheme="light")
                page.goto("/")
                picture = page.screenshot()
            except Exception as error:  # it starts, or stops, meanwhile: the terminal alone is shown
                print(f"no console: {type(error).__name__}", file=sys.stderr)
                page = None
        moments[chapter[1]] = Moment(chapter[1], terminal.html(), picture)
    return list(moments.values())


def _key(home: Path) -> str:
    return load_settings(home / "ratchet.yaml", environ={}).operator_key().get_secret_value()


def draw(browser: Browser, moments: Sequence[Moment], home: Path) -> list[Image.Image]:
    page = browser.new_page(viewport=FRAME)  # type: ignore[arg-type]
    pictures = []
    for each in moments:
        image = f'<img src="data:image/png;base64,{b64encode(each.console).decode()}">' if each.console else ""
        page.set_content(PAGE.format(terminal=each.terminal, console=image))
        pictures.append(page.screenshot())
    page.goto((home / "demo.html").resolve().as_uri())
    page.locator("section").first.scroll_into_view_if_needed()
    pictures.append(page.screenshot())
    return [Image.open(io.BytesIO(each)).convert("RGB") for each in pictures]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--home", type=Path, required=True, help="Home folder of the demo.")
    flags.add_argument("--out", type=Path, required=True, help="The picture, NAME.webp.")
    flags.add_argument("command", nargs="+", help="The demo's command.")
    asked = flags.parse_args()
    with chromium() as browser:
        terminal = Terminal(asked.command)
        moments = record(terminal, browser, asked.home)
        if terminal.status:
            raise SystemExit(terminal.text())
        first, *others = draw(browser, moments, asked.home)
    first.save(
        asked.out, save_all=True, append_images=others, duration=SHOWN_MS, loop=0, quality=QUALITY, method=6
    )  # fmt: skip
    print(f"{asked.out}: {1 + len(others)} pictures, {asked.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
