"""The baseline of ingest: a minimal kafka-python consumer that optionally decodes each image.

``python -m benchmarks.stream.bare BOOTSTRAP TOPIC COUNT [decode]`` connects, prints ``ready``, waits for a line, reads
this many records of the topic from its beginning, and prints its cost as JSON.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import time
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from PIL import Image

from core.errors import RatchetError

FETCH_BYTES = 16 << 20


def run_bare(bootstrap: str, topic: str, count: int, decode: bool) -> dict[str, float]:
    """Read ``count`` records in a new process: ``seconds``, ``cpu_seconds`` and ``memory`` (peak, bytes). Raises
    RatchetError if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.stream.bare", bootstrap, topic, str(count)]
    command += ["decode"] if decode else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RatchetError("the bare consumer did not connect.", "See what it printed above.")
            out, _ = process.communicate("go\n", timeout=600)
        except BaseException:  # also on a signal: it would read on
            process.kill()
            raise
    if process.returncode:
        raise RatchetError("the bare consumer failed.", "See what it printed above.")
    figures: dict[str, float] = json.loads(out)
    return figures


def _read(consumer: Any, count: int, decode: bool) -> None:
    read = 0
    while read < count:
        for records in consumer.poll(timeout_ms=250).values():
            for record in records if decode else ():
                Image.open(io.BytesIO(record.value)).convert("RGB")
            read += len(records)


def main() -> None:
    bootstrap, topic, count, *decode = sys.argv[1:]
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        group_id=None,
        isolation_level="read_committed",
        max_poll_records=256,
        fetch_max_bytes=FETCH_BYTES,
        max_partition_fetch_bytes=FETCH_BYTES // 2,
        receive_message_max_bytes=100 << 20,
    )
    partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(partitions)
    for partition in partitions:
        consumer.pause(partition)
    consumer.seek_to_beginning(*partitions)
    for partition in partitions:
        consumer.position(partition)
    print("ready", flush=True)
    sys.stdin.readline()
    began, used = time.perf_counter(), time.process_time()
    consumer.resume(*partitions)
    _read(consumer, int(count), bool(decode))
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
