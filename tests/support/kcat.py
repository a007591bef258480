"""A replacement of the part of ``kcat`` that an example uses, on the librdkafka of ``confluent-kafka``.

Before 2.3 (Debian 12 has 2.0.2, Ubuntu 22.04 has 1.8) librdkafka, and with it kcat, misreads tagged fields and gives up
on the embedded broker's answer to ApiVersions with "Read underflow"; no option helps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from confluent_kafka import Producer

ROOT = Path(__file__).parents[2]


def kcat_folder(folder: Path) -> Path:
    """A folder for the front of PATH."""
    script = folder / "kcat"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.support.kcat "$@"\n')
    script.chmod(0o755)
    return folder


def main() -> None:
    """Send each line of standard input, or each whole file, as a record."""
    parser = argparse.ArgumentParser(prog="kcat")
    parser.add_argument("-P", action="store_true", required=True)
    parser.add_argument("-b", dest="broker", required=True)
    parser.add_argument("-t", dest="topic", required=True)
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    failures: list[str] = []
    producer = Producer({"bootstrap.servers": options.broker})
    headers = [tuple(header.split("=", 1)) for header in options.headers]
    for value in [path.read_bytes() for path in options.files] or sys.stdin.buffer.read().splitlines():
        told = lambda error, _: failures.append(str(error)) if error else None  # noqa: E731
        producer.produce(options.topic, value, headers=headers, on_delivery=told)
    producer.flush()
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
