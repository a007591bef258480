from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.waiting import wait_until
from serving.ray import agent_placeholder

PORTS = pytest.importorskip("ray._raylet")
PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_placeholder_says_that_each_service_is_off_and_ends_with_its_raylet(tmp_path: Path) -> None:
    node = "ab" * 28
    arguments = [f"--session-dir={tmp_path}", f"--node-id={node}", "--grpc-port=0", "/ray/dashboard/agent.py"]
    command = [sys.executable, "-S", "-E", str(agent_placeholder.__file__), *arguments]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as raylet:
        assert raylet.stdin is not None and raylet.stdout is not None
        placeholder = Path(f"/proc/{int(raylet.stdout.readline())}")
        names = {
            PORTS.RUNTIME_ENV_AGENT_PORT_NAME, PORTS.METRICS_AGENT_PORT_NAME, PORTS.METRICS_EXPORT_PORT_NAME,
            PORTS.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        }  # fmt: skip
        files = {tmp_path / f"{name}_{node}" for name in names}
        assert wait_until(lambda: set(tmp_path.iterdir()) == files, 30.0)
        assert {path.read_text() for path in files} == {"-1"}
        assert not ended(placeholder)
        raylet.stdin.close()
        raylet.wait(30)
    assert wait_until(lambda: ended(placeholder), 30.0)


def ended(process: Path) -> bool:
    try:
        return not (process / "cmdline").read_bytes()  # empty for one that nobody has waited for
    except OSError:
        return True
