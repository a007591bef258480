"""Every test here needs Apache Kafka."""

from __future__ import annotations

import pytest

from tests.support.apache_kafka import ApacheKafka
from tests.support.broker import Broker


@pytest.fixture(scope="session")
def broker(apache_kafka: ApacheKafka) -> Broker:
    return Broker(apache_kafka.address, embedded=False)
