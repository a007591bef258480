from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray._private import node, ray_constants, services

from core.settings.serving import Serve
from core.waiting import wait_until
from serving.ray.ray_session import leave_out_helpers

RAYLET: Any = importlib.import_module("ray._raylet")
PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
sys.stdin.read()
"""
DASHBOARD, ENVIRONMENTS = (
    ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT,
)  # fmt: skip
PORTS = {
    DASHBOARD: {
        RAYLET.METRICS_AGENT_PORT_NAME, RAYLET.METRICS_EXPORT_PORT_NAME, RAYLET.DASHBOARD_AGENT_LISTEN_PORT_NAME,
    },
    ENVIRONMENTS: {RAYLET.RUNTIME_ENV_AGENT_PORT_NAME},
}  # fmt: skip
Commands = Callable[[int], Callable[[str], list[str]]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    """The start of an agent's command, by port of Ray's metrics and kind of agent."""
    for owner, name in (
        (node.Node, "start_api_server"),
        (node.Node, "start_monitor"),
        (services, "_build_python_executable_command_memory_profileable"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test

    def make(metrics_port: int) -> Callable[[str], list[str]]:
        leave_out_helpers(Serve(ray_metrics_port=metrics_port))
        return lambda kind: services._build_python_executable_command_memory_profileable(kind, str(tmp_path))

    return make


@pytest.mark.parametrize("kind", [DASHBOARD, ENVIRONMENTS])
def test_a_placeholder_says_that_its_services_are_off_and_ends_with_its_raylet(
    tmp_path: Path, commands: Commands, kind: str
) -> None:
    session, owner = tmp_path / "session", "ab" * 28
    session.mkdir()
    arguments = ["/ray/agent.py", f"--session-dir={session}", f"--node-id={owner}", "--grpc-port=0"]
    command = [sys.executable, "-c", PARENT, *commands(0)(kind), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as raylet:
        assert raylet.stdin is not None and raylet.stdout is not None
        placeholder = Path(f"/proc/{int(raylet.stdout.readline())}")
        files = {session / f"{name}_{owner}" for name in PORTS[kind]}
        assert wait_until(lambda: set(session.iterdir()) == files, 30.0)
        assert {path.read_text() for path in files} == {"-1"}
        assert not ended(placeholder)
        raylet.stdin.close()
        raylet.wait(30)
    assert wait_until(lambda: ended(placeholder), 30.0)


def test_the_dashboards_agent_runs_where_it_exports_rays_metrics(commands: Commands) -> None:
    commands(0)
    later = commands(9123)
    python = later(ray_constants.PROCESS_TYPE_LOG_MONITOR)
    assert later(DASHBOARD) == python
    placeholder = later(ENVIRONMENTS)
    assert placeholder[: len(python)] == python
    assert {word for word in placeholder if word.startswith("--off=")} == {
        f"--off={RAYLET.RUNTIME_ENV_AGENT_PORT_NAME}"
    }


def ended(process: Path) -> bool:
    try:
        return not (process / "cmdline").read_bytes()  # empty for a zombie
    except OSError:
        return True
