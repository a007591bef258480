"""Placeholder for an agent of Ray that nothing here uses: a raylet does not start, and ends, without the process. Tells
the raylet which services are off, as Ray's own agent does where its dependencies are missing, and ends with
the raylet. A script without imports of Ray, which would take a second of a processor."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

OFF = "-1"
LOOK_SECONDS = 1.0


def main() -> None:
    raylet = os.getppid()
    parser = argparse.ArgumentParser()
    parser.add_argument("--off", action="append", help="name of a port of a service that is off")
    parser.add_argument("--session-dir", type=Path, required=True)
    parser.add_argument("--node-id", required=True)
    options, _ = parser.parse_known_args()
    for port in options.off:
        path = options.session_dir / f"{port}_{options.node_id}"
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(OFF)
        new.replace(path)
    while os.getppid() == raylet:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
