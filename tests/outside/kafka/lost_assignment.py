"""Count how often kafka-python alone never gets the assignment of a group that it has joined.

``python -m tests.outside.kafka.lost_assignment [--tries 40] [--poll-ms 5] [--fixed]``: starts Apache Kafka. See
``kafka_python_report.md`` in this folder.
"""

from __future__ import annotations

import argparse
import logging
import time
import uuid
from collections import Counter

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import NewTopic

from streams.kafka.tolerant_fetch import complete_joins
from tests.support.apache_kafka import ApacheKafka

WAIT_SECONDS = 12


def assigned(address: str, topic: str, poll_ms: int, fixed: bool) -> bool:
    """Whether a new group's only member gets its partitions. ``fixed``: with the change that the report proposes, which
    Ratchet makes for its own consumers.
    """
    consumer = KafkaConsumer(
        bootstrap_servers=address, group_id=uuid.uuid4().hex, session_timeout_ms=6000, heartbeat_interval_ms=2000,
        enable_auto_commit=False,
    )  # fmt: skip
    if fixed:
        complete_joins(consumer)
    consumer.subscribe([topic])
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and not consumer.assignment():
        consumer.poll(timeout_ms=poll_ms)
    found = bool(consumer.assignment())
    consumer.close(autocommit=False, timeout_ms=1000)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--poll-ms", type=int, default=5)
    parser.add_argument("--fixed", action="store_true", help="with the change that the report proposes")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with ApacheKafka() as kafka:
        topic = "alone"
        admin = KafkaAdminClient(bootstrap_servers=kafka.address)
        admin.create_topics([NewTopic(topic, 2, 1)])
        admin.close()
        seen = Counter(assigned(kafka.address, topic, given.poll_ms, given.fixed) for _ in range(given.tries))
    print(f"polls of {given.poll_ms} ms: {seen[True]} assigned, {seen[False]} not within {WAIT_SECONDS} s")


if __name__ == "__main__":
    main()
