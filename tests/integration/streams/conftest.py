"""The broker of these tests, and what their processes import."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ops.ledger import Ledger
from ops.settings import Settings
from tests.support.broker import broker
from tests.support.forked import import_ahead

import_ahead("tests.support.mortal_ingest", "tests.support.stopping_ingest", "tests.support.mortal_publisher")
__all__ = ["broker"]


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger.open(settings.ledger)
    yield opened
    opened.close()
