"""Every start is let into the consumer group."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.outside.kafka.lost_assignment import assigned
from tests.support.broker import Broker
from tests.support.kafka import make_topics, reading

pytestmark = [pytest.mark.integration, pytest.mark.kafka]
AT_ONCE = 4
WITHIN_SECONDS = 25.0
"""Less than ingest itself waits before it joins again, so that a failed join shows."""


def seconds_to_join(broker: Broker, home: Path) -> float:
    settings = broker.settings(home)
    make_topics(settings)
    with reading(settings) as ingest:
        started = time.monotonic()
        while ingest.status.state != "reading" and time.monotonic() - started < WITHIN_SECONDS:
            time.sleep(0.05)
        return time.monotonic() - started


@pytest.mark.timeout(6000)
@pytest.mark.parametrize("starts", [8, pytest.param(200, marks=pytest.mark.long)])
def test_every_start_is_let_into_the_group(broker: Broker, tmp_path: Path, starts: int) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        took = list(pool.map(lambda number: seconds_to_join(broker, tmp_path / str(number)), range(starts)))
    stuck = sum(seconds >= WITHIN_SECONDS for seconds in took)
    print(f"{stuck} of {starts} starts not let in within {WITHIN_SECONDS:.0f} s; the slowest took {max(took):.1f} s")
    assert stuck == 0


def test_a_join_that_polls_leave_half_done_is_completed(broker: Broker, tmp_path: Path) -> None:
    """kafka-python alone fails nine of ten times; see ``kafka_python_report.md``."""
    settings = broker.settings(tmp_path)
    make_topics(settings)
    assert all(assigned(broker.address, settings.kafka.topic, poll_ms=1, fixed=True) for _ in range(10))
