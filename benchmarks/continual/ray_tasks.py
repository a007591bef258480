"""Workers as tasks of a Ray cluster, whose nodes see the home in the same place, and have a checkout there as well."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.continual.runner import Process
from core.errors import ConfigError

LOOK_SECONDS = 0.5
CONNECT_SECONDS = 10.0
SIGTERM_CODE = -15
"""Of a task that was cancelled before it began."""


def ray_tasks(address: str) -> tuple[Callable[[Sequence[str], Mapping[str, str], Path], Process], int]:
    """How to start a worker on the cluster at ``address``, and how many processors it has. Raises ConfigError."""
    import ray

    try:
        if ":" in address:  # Ray itself would wait for minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray cluster at {address}: {error}", "Name its head, as HOST:6379.") from None
    run = ray.remote(num_cpus=1, max_retries=0)(_run)

    def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        return _Task(run.remote(list(command), dict(environment), str(log), str(Path.cwd())))

    return start, int(ray.cluster_resources().get("CPU", 1))


def _run(command: Sequence[str], environment: Mapping[str, str], log: str, folder: str) -> int:
    with Path(log).open("ab") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)  # Ray cancels a task by an exception, which a blocking call would not see
    finally:
        process.terminate()
    return process.wait()


class _Task:
    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self.returncode = 0

    def poll(self) -> int | None:
        return self._ended(0.0)

    def terminate(self) -> None:
        import ray

        ray.cancel(self._reference)

    def wait(self) -> int:
        ended = self._ended(None)
        assert ended is not None
        return ended

    def _ended(self, seconds: float | None) -> int | None:
        import ray

        if not ray.wait([self._reference], timeout=seconds)[0]:
            return None
        try:
            self.returncode = ray.get(self._reference)
        except ray.exceptions.RayError:  # cancelled, or its node is lost: what is missing is run at the next call
            self.returncode = SIGTERM_CODE
        return self.returncode
