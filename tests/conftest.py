"""Fixtures that every room of the tests may use."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from tests.support.apache_kafka import ApacheKafka
from tests.support.downloads import started
from tests.support.postgres import postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL, started once."""
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[ApacheKafka]:
    """Apache Kafka, started once; skips where this machine cannot run it."""
    with started("Apache Kafka", ApacheKafka) as kafka:
        yield kafka


class _StandardError(logging.Handler):
    """Writes to what standard error is now, which ``capsys`` replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@pytest.fixture(scope="session", autouse=True)
def progress_on_standard_error() -> None:
    """What is said of progress can be read from ``capsys``, as where a program has configured its log."""
    logger = logging.getLogger("ratchet.progress")
    logger.addHandler(_StandardError())
    logger.setLevel(logging.INFO)
