"""Takes the README's picture, the searches before and after an update, from the page that the demo wrote.

>>> python -m tests.support.demo_picture .ratchet/demo/demo.html docs/images/searches.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.browser import chromium

WIDTH = 1100


def take(page: Path, picture: Path) -> None:
    """Write the page's first section, which has the searches, as a PNG."""
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
        tab.goto(page.resolve().as_uri())
        tab.locator("section").first.screenshot(path=picture)


if __name__ == "__main__":
    take(*map(Path, sys.argv[1:3]))
