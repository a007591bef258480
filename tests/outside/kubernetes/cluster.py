"""A real one-node Kubernetes with KubeRay, and the chart in it: set up by the scripts in ``node/``, or an
existing one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from core.progress import progress_log
from tests.support.chart import CHART
from tests.support.downloads import CACHE, SYSTEM_PATH, NotHere

NAMESPACE, RELEASE, CLIENT = "ml", "ratchet", "client"
USER: Final = ("--kube-as-user", "ann", "--kube-as-group", "system:authenticated")
"""The administrator of only the namespace."""
WORKERS: Final = "app.kubernetes.io/component=serving-worker"
UPGRADE_SECONDS: Final = 900
SCRIPTS: Final = Path(__file__).parent / "node"
STEPS: Final = ("build.sh", "image.sh", "start.sh", "stores.sh", "node.sh", "install.sh")
STEP_SECONDS: Final = 7200
"""The first builds Kubernetes in half an hour, once; the others take at most minutes."""
PROGRAMS: Final = {
    "go": "Go (https://go.dev/dl)", "containerd": "containerd", "runc": "runc", "etcd": "etcd-server",
    "debootstrap": "debootstrap", "iptables": "iptables", "ipset": "ipset", "redis-server": "redis-server",
}  # fmt: skip
"""Programs, and the Debian package that has each."""
_BUILT: Final = dict(re.findall(r"\b(kubernetes|kuberay|helm)=v?([\d.]+)", (SCRIPTS / "build.sh").read_text()))
VERSIONS: Final = "{kubernetes} of one node, KubeRay {kuberay}, Helm {helm}".format(**_BUILT)


class Cluster:
    """Commands of an operator. ``values``: the file that the release was installed with."""

    def __init__(self, values: Path) -> None:
        self.values = values

    def kubectl(self, *words: str, seconds: float = 120) -> str:
        return run("kubectl", "--namespace", NAMESPACE, *words, seconds=seconds).stdout

    def helm(self, verb: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``install`` or ``upgrade`` with this checkout's chart, or another verb."""
        chart = [str(CHART), "--values", str(self.values), "--timeout", "15m"] if verb in ("install", "upgrade") else []
        line = ["helm", verb, RELEASE, *chart, "--namespace", NAMESPACE, *USER, *words]
        return run(*line, seconds=UPGRADE_SECONDS, check=check)

    def upgrade(self, *settings: str) -> None:
        self.helm("upgrade", *(word for each in settings for word in ("--set", each)))
        self.replaced()

    def replaced(self) -> None:
        self.helm("test", "--timeout", "15m")  # asks the workers of this version alone
        label = json.loads(self.kubectl("get", "service", f"{RELEASE}-this-version", "--output", "json"))
        version = label["spec"]["selector"]["ratchet/cluster"]
        old = f"{WORKERS},ratchet/cluster!={version}"
        self.kubectl("wait", "pod", "--for=delete", "--selector", old, "--timeout=10m", seconds=UPGRADE_SECONDS)

    def pods(self, labels: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", "pods", "-l", labels, "--output", "json"))["items"]
        return found

    def ready(self, labels: str = WORKERS) -> list[str]:
        return [
            pod["metadata"]["name"]
            for pod in self.pods(labels)
            if any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))
        ]

    def active(self) -> str:
        path = "--output=jsonpath={.status.activeServiceStatus.rayClusterName}"
        return self.kubectl("get", "rayservice", RELEASE, path)

    def reaches(self, host: str, port: int) -> bool:
        done = self._in_client(f"import socket; socket.create_connection(('{host}', {port}), 5)")
        assert not done.returncode or "TimeoutError" in done.stderr or "refused" in done.stderr, done.stderr
        return done.returncode == 0

    def keys_in_redis(self) -> int:
        (address,) = re.findall(r'redisAddress: "?([^"}]+)', self.values.read_text())
        connect = f"import socket; s = socket.create_connection({tuple(address.split(':'))})"
        done = self._in_client(f"{connect}; s.sendall(b'DBSIZE\\r\\n'); print(s.recv(99).decode())")
        return int(done.stdout.strip().removeprefix(":"))

    def _in_client(self, program: str) -> subprocess.CompletedProcess[str]:
        words = ["kubectl", "--namespace", NAMESPACE, "exec", CLIENT, "--", "python3", "-c", program]
        return run(*words, seconds=60, check=False)

    @contextmanager
    def load(self) -> Iterator[dict[str, Any]]:
        """Send requests during the block; after it, the mapping has the results of
        :mod:`tests.outside.kubernetes.load`.
        """
        console = f"deploy/{RELEASE}-console"
        key = self.kubectl("exec", console, "--", "env", "USER=outside", "ratchet", "keys", "create",
                           f"load-{time.time_ns()}", "--scope", "infer").strip()  # fmt: skip
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


@contextmanager
def new_cluster() -> Iterator[Cluster]:
    """Set up a cluster for as long as the block. Raises NotHere if a requirement is missing on this machine."""
    if os.geteuid():
        raise NotHere("a node is made of namespaces, which takes root")
    path = f"{SYSTEM_PATH}:{os.environ['PATH']}"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    if missing:
        raise NotHere(f"needs {', '.join(missing)}")
    folder = CACHE / "kubernetes"
    environ = os.environ | {"PATH": f"{folder / 'bin'}:{path}", "KUBECONFIG": str(folder / "run" / "admin.conf")}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "KUBECONFIG"):
            patch.setenv(name, environ[name])
        try:
            for script in STEPS:
                progress_log.info(f"kubernetes: {script}")
                run("bash", str(SCRIPTS / script), seconds=STEP_SECONDS)
            yield Cluster(folder / "run" / "values.yaml")
        finally:
            run("bash", str(SCRIPTS / "stop.sh"), seconds=300)


def found_cluster(values: Path) -> Cluster:
    """Use the cluster of ``KUBECONFIG``, where the chart was installed with these values. Raises NotHere if it cannot
    be reached, or has no such release.
    """
    missing = [program for program in ("kubectl", "helm") if not shutil.which(program)]
    if missing:
        raise NotHere(f"{' and '.join(missing)} not found")
    asked = run("kubectl", "--namespace", NAMESPACE, "get", "rayservice", RELEASE, seconds=30, check=False)
    if asked.returncode:
        raise NotHere(f"no release {RELEASE} in namespace {NAMESPACE}: {asked.stderr.strip()}")
    return Cluster(values)


def run(*words: str, seconds: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. With ``check``, a failing command fails the test. Raises TimeoutExpired."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode:
        pytest.fail(f"{' '.join(words)}: {done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done
