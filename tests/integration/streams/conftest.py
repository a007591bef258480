"""The broker of these tests, and the imports of their processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from core.ledger import Ledger
from core.settings import Settings
from tests.support.broker import broker
from tests.support.forked import import_ahead

import_ahead("tests.support.mortal_streams")
__all__ = ["broker"]
OF_EACH_BROKER = {"test_broker_faults", "test_corrupt_batches", "test_fenced_sender", "test_ingest", "test_skip"}
"""Modules that test the broker itself; the others run against Apache Kafka only if RATCHET_TEST_KAFKA says so, as in
``make outside``."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if "broker" in metafunc.fixturenames and module in OF_EACH_BROKER and "RATCHET_TEST_KAFKA" not in os.environ:
        brokers = ["embedded", pytest.param("apache", marks=pytest.mark.kafka)]
        metafunc.parametrize("broker", brokers, indirect=True, scope="session")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger.open(settings.ledger)
    yield opened
    opened.close()
