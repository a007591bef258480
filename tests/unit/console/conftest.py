"""A home without a server, its ledger and its visitors, beside other tests that take the processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from ops.console.app import build_console
from tests.unit.console.test_pages import settings
from tests.unit.console.test_security import LOCAL, signed_in


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """A page waits for the store: its first call of the process imports Lance, which has taken more than 5 s here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ops.console.data.PATIENCE_SECONDS", 120.0)
        yield


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(settings(tmp_path).ledger)
    yield opened
    opened.close()


@pytest.fixture
def visitor(tmp_path: Path, ledger: Ledger) -> Iterator[TestClient]:
    with TestClient(build_console(settings(tmp_path)), base_url=LOCAL, follow_redirects=False) as client:
        yield client


@pytest.fixture
def operator(tmp_path: Path, visitor: TestClient) -> TestClient:
    """A visitor who may act."""
    visitor.headers["x-csrf-token"] = signed_in(visitor, settings(tmp_path).operator_key().get_secret_value())
    return visitor
