"""The console's pages over a real ledger and store, with no server: each shows what it can, and says what is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ops.console.app import build_console
from ops.ledger import Ledger
from ops.settings import Settings
from tests.support.story import EVIL, Story, tell

PAGES = ("/", "/playground", "/compare", "/releases", "/gate", "/quarantine", "/budget", "/audit", "/sign-in")
NAVIGATED = {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}


def settings(home: Path, **console: object) -> Settings:
    """A home whose server nobody started: port 1 answers nobody."""
    return Settings(home=home, serve={"port": 1}, base={"vlm": ""}, console=console)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def story(home: Path) -> Story:
    made = tell(settings(home), home / "made")
    ledger = Ledger.open(settings(home).ledger)
    ledger.commit_release(1, clip=None, vlm=None, actor="controller", reason="first start", proposal_id=None)
    wish = ledger.propose("update", clip=made.adapter, actor="updater", reason="passed", update_id=made.passed)
    ledger.commit_release(2, clip=made.adapter, vlm=None, actor="updater", reason=EVIL, proposal_id=wish.id)
    ledger.close()
    return made


@pytest.fixture
def visitor(home: Path, story: Story) -> Iterator[TestClient]:
    with TestClient(build_console(settings(home)), base_url="http://127.0.0.1:8001", follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_without_a_server(visitor: TestClient, page: str) -> None:
    answer = visitor.get(page)
    assert answer.status_code == 200, answer.text
    assert "<h1>" in answer.text
    assert "<script>" not in answer.text and "style=" not in answer.text, "the policy forbids both"
