"""A cluster that has KubeRay, and the chart as release ``ratchet`` in the namespace ``ml``; else tests are skipped.

``OUTSIDE_VALUES`` names the values that it was installed with, and ``KUBECONFIG`` the cluster. The namespace has a pod
``client`` with Python, which may call the model server. The tests change and reinstall the release.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ops.testing.chart import CHART

NAMESPACE, RELEASE, CLIENT = "ml", "ratchet", "client"
WORKERS = "app.kubernetes.io/component=serving-worker"
UPGRADE_SECONDS = 900


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kubernetes: needs a cluster with KubeRay, where the chart is installed")


class Cluster:
    """Commands of an operator. ``values``: the file that the release was installed with."""

    def __init__(self, values: Path) -> None:
        self.values = values

    def kubectl(self, *words: str, seconds: float = 120) -> str:
        """Standard output. A command that fails fails the test."""
        return run("kubectl", "--namespace", NAMESPACE, *words, seconds=seconds).stdout

    def helm(self, verb: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``install`` and ``upgrade`` of this checkout's chart, or another verb."""
        chart = [str(CHART), "--values", str(self.values), "--timeout", "15m"] if verb in ("install", "upgrade") else []
        line = ["helm", verb, RELEASE, *chart, "--namespace", NAMESPACE, *words]
        return run(*line, seconds=UPGRADE_SECONDS, check=check)

    def upgrade(self, *settings: str) -> None:
        """Return when the pods of the new version serve, and those of the version before are gone."""
        self.helm("upgrade", *(word for each in settings for word in ("--set", each)))
        self.helm("test", "--timeout", "10m")  # asks the workers of this version alone
        label = json.loads(self.kubectl("get", "service", f"{RELEASE}-this-version", "--output", "json"))
        version = label["spec"]["selector"]["ratchet/cluster"]
        old = f"{WORKERS},ratchet/cluster!={version}"
        self.kubectl("wait", "pod", "--for=delete", "--selector", old, "--timeout=10m", seconds=UPGRADE_SECONDS)

    def ready_workers(self) -> int:
        """Workers whose containers are all ready."""
        pods: list[dict[str, Any]] = json.loads(self.kubectl("get", "pods", "-l", WORKERS, "--output", "json"))["items"]
        conditions = [{each["type"]: each["status"] for each in pod["status"]["conditions"]} for pod in pods]
        return sum(each.get("Ready") == "True" for each in conditions)

    @contextmanager
    def load(self) -> Iterator[dict[str, Any]]:
        """Requests meanwhile; after the block, the mapping has what :mod:`tests.outside.kubernetes.load` found."""
        console = f"deploy/{RELEASE}-console"
        key = self.kubectl("exec", console, "--", "env", "USER=outside", "ratchet", "keys", "create", "load",
                           "--scope", "infer").strip()  # fmt: skip
        end = f"/tmp/end-{os.getpid()}"
        words = ["kubectl", "--namespace", NAMESPACE, "exec", "--stdin", CLIENT, "--", "python", "-"]
        found: dict[str, Any] = {}
        with (Path(__file__).parent / "load.py").open() as program:
            process = subprocess.Popen(
                [*words, f"{RELEASE}-serve-svc:8000", key, end], stdin=program, stdout=subprocess.PIPE, text=True
            )
        try:
            yield found
        finally:
            self.kubectl("exec", CLIENT, "--", "touch", end)
            output, _ = process.communicate(timeout=60)
            self.kubectl("exec", CLIENT, "--", "rm", end)
        found |= json.loads(output)


def run(*words: str, seconds: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command with its output. If ``check`` is set, one that fails fails the test. Raises TimeoutExpired."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode:
        pytest.fail(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    missing = [program for program in ("kubectl", "helm") if not shutil.which(program)]
    if missing:
        pytest.skip(f"no cluster: {' and '.join(missing)} not found")
    values = os.environ.get("OUTSIDE_VALUES", "")
    if not values:
        pytest.skip("no cluster: OUTSIDE_VALUES does not name the values that the chart was installed with")
    asked = run("kubectl", "--namespace", NAMESPACE, "get", "rayservice", RELEASE, seconds=30, check=False)
    if asked.returncode:
        pytest.skip(f"no cluster with release {RELEASE} in namespace {NAMESPACE}: {asked.stderr.strip()}")
    return Cluster(Path(values))
