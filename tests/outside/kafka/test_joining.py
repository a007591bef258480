"""Every start is let into the consumer group."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.broker import Broker
from tests.support.kafka import make_topics, reading

pytestmark = [pytest.mark.integration, pytest.mark.kafka]
AT_ONCE = 4
WITHIN_SECONDS = 25.0
"""Less than ingest itself waits before it joins again, so that a start that was not let in shows."""


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
