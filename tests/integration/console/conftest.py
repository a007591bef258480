"""A broker with ingest, a console and a browser for all tests of the console, and the server that has a VLM."""

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
    reader: str
    """Token of a key that may only read."""

    @property
    def live(self) -> int:
        found = self.server.ledger.live()
        return found.number if found else 0


@pytest.fixture(scope="module")
def place(
    shared_vlm_server: ServerFixture, tmp_path_factory: pytest.TempPathFactory, broker: Broker
) -> Iterator[Place]:
    server, home = shared_vlm_server, tmp_path_factory.mktemp("console")
    server.ensure_running()
    kafka = broker.settings(home).kafka.model_dump(
        include={"bootstrap", "topic", "quarantine_topic", "group", "batch_seconds"}
    )
    port, config = free_port(), home / "ratchet.yaml"
    own = {"console": {"port": port}, "kafka": kafka}
    config.write_text(yaml.safe_dump(yaml.safe_load(server.config.read_text()) | own))
    settings = load_settings(config, environ={})
    server.add_samples(24, domain="cats", source="zoo", year=2023)
    story = tell(settings, home / "made-up", server.adapter())
    make_topics(settings)
    _, operator = server.ledger.create_key("ana", ["infer", "search", "operate"], actor="test")
    _, reader = server.ledger.create_key("guest", ["infer", "search"], actor="test")
    with (
        reading(settings) as ingest,
        console(config, f"http://127.0.0.1:{port}", home / "console.log") as url,
    ):
        yield Place(server, settings, config, url, story, ingest, operator, reader)


@pytest.fixture(scope="module")
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
    sign_in(visitor, place.operator)
    return visitor


def sign_in(page: Page, token: str) -> None:
    page.goto("/sign-in")
    page.get_by_label("API key").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()
