"""Placeholder for an agent of Ray that nothing here uses: a raylet does not start, and ends, without the process. Tells
the raylet that the agent's services are off, as Ray's own agent does where its dependencies are missing, and ends with
the raylet. A script without imports of Ray, which would take a second of a processor."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

SERVICES = ("runtime_env_agent_port", "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
OFF = "-1"
LOOK_SECONDS = 1.0


def main() -> None:
    raylet = os.getppid()
    parser = argparse.ArgumentParser()
    parser.add_argument("--session-dir", type=Path, required=True)
    parser.add_argument("--node-id", required=True)
    options, _ = parser.parse_known_args()
    for service in SERVICES:
        path = options.session_dir / f"{service}_{options.node_id}"
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(OFF)
        new.replace(path)
    while os.getppid() == raylet:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
