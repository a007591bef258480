"""Fixtures for all tests."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator

import pytest

from tests.support.apache_kafka import ApacheKafka
from tests.support.downloads import started
from tests.support.postgres import postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[ApacheKafka]:
    with started("Apache Kafka", ApacheKafka) as kafka:
        yield kafka


class _StandardError(logging.Handler):
    """Writes to the current standard error, which ``capsys`` replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@pytest.fixture(scope="session", autouse=True)
def progress_on_standard_error() -> None:
    logger = logging.getLogger("ratchet.progress")
    logger.addHandler(_StandardError())
    logger.setLevel(logging.INFO)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported now is no garbage later
