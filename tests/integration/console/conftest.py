"""A broker with ingest, a console and a browser for all tests of the console, beside the server of serving's tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page

from core.addresses import free_port
from core.loading import load_settings
from core.settings import Settings
from streams.ingest.consumer import Consumer
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.broker import Broker, broker
from tests.support.browser import DESKTOP, Complaints, chromium, console
from tests.support.kafka import make_topics, reading
from tests.support.story import Story, tell

__all__ = ["broker"]


@dataclass
class Place:
    server: ServerFixture
    settings: Settings
    config: Path
    url: str
    story: Story
    ingest: Consumer
    operator: str
    """Token of a key of the name `ana` that may act."""

    @property
    def live(self) -> int:
        found = self.server.ledger.live()
        return found.number if found else 0


@pytest.fixture(scope="module")
def place(shared_server: ServerFixture, tmp_path_factory: pytest.TempPathFactory, broker: Broker) -> Iterator[Place]:
    server, home = shared_server, tmp_path_factory.mktemp("console")
    server.ensure_running()
    kafka = broker.settings(home).kafka.model_dump(
        include={"bootstrap", "topic", "quarantine_topic", "group", "batch_seconds"}
    )
    port, config = free_port(), home / "ratchet.yaml"
    own = {"console": {"port": port}, "kafka": kafka}
    config.write_text(yaml.safe_dump(yaml.safe_load(server.config.read_text()) | own))
    settings = load_settings(config, environ={})
    story = tell(settings, home / "made-up", server.adapter())
    make_topics(settings)
    _, operator = server.ledger.create_key("ana", ["infer", "search", "operate"], actor="test")
    with (
        reading(settings) as ingest,
        console(config, f"http://127.0.0.1:{port}", home / "console.log") as url,
    ):
        yield Place(server, settings, config, url, story, ingest, operator)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def visitor(place: Place, browser: Browser) -> Iterator[Page]:
    """A first-time visitor; fails if a script of a page fails or a page violates its policy."""
    context = browser.new_context(base_url=place.url, viewport=DESKTOP)
    page = context.new_page()
    page.set_default_timeout(30_000)
    complaints = Complaints(page)
    yield page
    context.close()
    assert complaints.heard == []


@pytest.fixture
def ana(visitor: Page, place: Place) -> Page:
    """A visitor who has signed in with a key that may act."""
    visitor.goto("/sign-in")
    visitor.get_by_label("API key").fill(place.operator)
    visitor.get_by_role("button", name="Sign in").click()
    visitor.get_by_role("button", name="Sign out").wait_for()
    return visitor
