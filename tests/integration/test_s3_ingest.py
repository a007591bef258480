"""The requests that ingest sends to an S3 server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from core.settings import Settings
from streams.ingest import ingest_report
from tests.support.fake_kafka import FakeKafka, install
from tests.support.kafka import good, reading, wait_for
from tests.support.s3 import s3_server

pytestmark = pytest.mark.integration


class Requests(logging.Handler):
    """Method and path of every request to the server."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.made.append(record.getMessage().partition('"')[2])

    def count(self, method: str, part: str = "") -> int:
        return sum(each.startswith(method) and part in each for each in self.made)


@pytest.fixture
def requests() -> Iterator[Requests]:
    handler, logger = Requests(), logging.getLogger("werkzeug")
    logger.addHandler(handler)
    before, logger.level = logger.level, logging.INFO
    with s3_server():
        boto3.client("s3").create_bucket(Bucket="trickle")
        yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_commit_of_a_trickle_costs_two_listings_and_four_objects(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = FakeKafka("t")
    install(kafka, monkeypatch)
    monkeypatch.setattr(ingest_report, "STORE_SECONDS", 3600.0)
    settings = Settings.model_validate(
        {
            "home": tmp_path, "lake_url": "s3://trickle/lake",
            "kafka": {"topic": "t", "batch_seconds": 0.02, "bootstrap": "127.0.0.1:1"},
        }
    )  # fmt: skip
    with reading(settings) as consumer:
        for number in range(3):  # what the start needs
            kafka.send(good(number))
            wait_for(lambda n=number: consumer.status.samples > n, "a sample")  # type: ignore[misc]
        requests.made.clear()
        commits = consumer.status.commits
        for number in range(3, 8):
            kafka.send(good(number))
            wait_for(lambda n=number: consumer.status.samples > n, "a sample")  # type: ignore[misc]
        commits = consumer.status.commits - commits
        assert commits == 5
        assert requests.count("GET", "list-type=2") == 2 * commits, requests.made
        assert requests.count("PUT") == 4 * commits, requests.made
