"""``kcat`` for the tests: the installed one if it can talk to the embedded broker, or a replacement of the part that
tests use.

kcat is a command line around librdkafka. Before 2.3 (Debian 12 has 2.0.2, Ubuntu 22.04 has 1.8) librdkafka misreads
tagged fields and gives up on the embedded broker's answer to ApiVersions with "Read underflow"; no option helps. The
replacement sends the same records through the newer librdkafka of ``confluent-kafka``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from confluent_kafka import Producer

ROOT = Path(__file__).parents[2]
READS_TAGGED_FIELDS = (2, 3)


def kcat_folder(folder: Path) -> Path:
    """A folder for the front of PATH with a ``kcat`` that works with the embedded broker."""
    installed = shutil.which("kcat")
    if installed is not None and _librdkafka(installed) >= READS_TAGGED_FIELDS:
        return Path(installed).parent
    script = folder / "kcat"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m tests.support.kcat "$@"\n')
    script.chmod(0o755)
    return folder


def _librdkafka(kcat: str) -> tuple[int, ...]:
    said = subprocess.run([kcat, "-V"], capture_output=True, text=True, check=False)
    version = re.search(r"librdkafka (\d+)\.(\d+)", said.stdout + said.stderr)
    return tuple(map(int, version.groups())) if version else (0,)


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
    values = [path.read_bytes() for path in options.files] or sys.stdin.buffer.read().splitlines()
    for value in values:
        producer.produce(
            options.topic, value, headers=[tuple(header.split("=", 1)) for header in options.headers],
            on_delivery=lambda error, _: failures.append(str(error)) if error else None,
        )  # fmt: skip
    producer.flush()
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
