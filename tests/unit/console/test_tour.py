"""The tour points to what is there, and is help where there is no script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ops.console.app import build_console
from ops.console.tour import STEPS
from tests.unit.console.test_pages import settings
from tests.unit.console.test_security import LOCAL


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    home = tmp_path_factory.mktemp("tour")
    with TestClient(build_console(settings(home)), base_url=LOCAL, follow_redirects=False) as client:
        yield client


def test_each_step_points_to_a_part_of_the_overview(visitor: TestClient) -> None:
    page = visitor.get("/").text
    for step in STEPS:
        assert page.count(f'id="{step.target}"') == 1, step.target
        assert f'data-target="{step.target}"' in page


def test_the_part_that_asks_again_has_the_same_targets(visitor: TestClient) -> None:
    part = visitor.get("/overview/now", headers={"hx-request": "true"}).text
    assert all(f'id="{step.target}"' in part for step in STEPS if step.target.startswith("tour-"))


def test_without_a_script_the_tour_is_a_page_whose_links_lead_somewhere(visitor: TestClient) -> None:
    page = visitor.get("/tour").text
    assert all(step.title in page and f'href="{step.link}"' in page for step in STEPS)
    assert 'href="/tour"' in visitor.get("/").text
    assert all(visitor.get(step.link).status_code == 200 for step in STEPS)


def test_a_public_console_has_no_tour(tmp_path: Path) -> None:
    with TestClient(build_console(settings(tmp_path, public=True)), base_url=LOCAL) as screen:
        assert "tour.js" not in screen.get("/").text and 'id="tour"' not in screen.get("/").text
        assert screen.get("/tour").status_code == 404
