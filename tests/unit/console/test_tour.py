"""The tour points to what is there, and is help where there is no script."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.testclient import TestClient

from ops.console.app import build_console
from tests.unit.console.test_pages import settings
from tests.unit.console.test_security import LOCAL


def test_each_step_points_to_a_part_of_the_overview_and_the_tours_page_leads_somewhere(tmp_path: Path) -> None:
    with TestClient(build_console(settings(tmp_path)), base_url=LOCAL, follow_redirects=False) as visitor:
        page, tour = visitor.get("/").text, visitor.get("/tour").text
        part = visitor.get("/overview/now", headers={"hx-request": "true"}).text
        targets = re.findall(r'data-target="([^"]+)"', page)
        assert len(targets) == 7 and 'href="/tour"' in page
        for target in targets:
            assert page.count(f'id="{target}"') == 1, target
            assert target.startswith("nav-") or f'id="{target}"' in part, "the part that asks again has it, too"
        links = re.findall(r'<p><a href="([^"]+)">To the page', tour)
        assert len(links) == 7 and all(visitor.get(link).status_code == 200 for link in links)


def test_a_public_console_has_no_tour(tmp_path: Path) -> None:
    with TestClient(build_console(settings(tmp_path, public=True)), base_url=LOCAL) as screen:
        assert "tour.js" not in screen.get("/").text and 'id="tour"' not in screen.get("/").text
        assert screen.get("/tour").status_code == 404
