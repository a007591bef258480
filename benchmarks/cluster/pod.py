"""A pod with its volumes, ordered containers and probes, and a kubelet's restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.cluster.container import Container, Mount, start_sandbox
from benchmarks.cluster.image import USER, Image
from benchmarks.cluster.network import Network
from benchmarks.cluster.volumes import ConfigObjects, Volumes
from core.errors import RatchetError
from core.progress import progress_log

SECURITY: Final = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "privileged": False,
    "capabilities": {"drop": ["ALL"]},
}  # fmt: skip
"""Fields that :mod:`benchmarks.cluster.container` implements; others are rejected."""
RESTART_SECONDS: Final = 10.0
"""Delay of the first restart; doubled for each further one."""
MOST_RESTART_SECONDS: Final = 300.0
LOOK_SECONDS: Final = 0.5
PROBES: Final = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass
class ProbeState:
    """Results of a probe since its container started."""

    due: float = 0.0
    failures: int = 0
    passed: bool = False


@dataclass
class Running:
    """A running container and its probes."""

    spec: Mapping[str, Any]
    container: Container
    probes: dict[str, ProbeState] = field(default_factory=lambda: {name: ProbeState() for name in PROBES})
    restarts: int = 0
    restart_at: float | None = None

    def is_ready(self) -> bool:
        """True if its last readiness probe passed, or, without one, if it runs."""
        if self.container.status is not None:
            return False
        return self.probes["readinessProbe"].passed or "readinessProbe" not in self.spec


class Pod:
    """A pod of a template. Its thread starts its containers, and keeps them running until :meth:`stop` or
    :meth:`kill`.
    """

    def __init__(
        self,
        name: str,
        template: Mapping[str, Any],
        *,
        image: Image,
        network: Network,
        objects: ConfigObjects,
        folder: Path,
    ) -> None:
        self.name = name
        self.spec: Mapping[str, Any] = template["spec"]
        self.labels: Mapping[str, str] = template["metadata"].get("labels", {})
        self.image, self.objects = image, objects
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self.restarts: list[str] = []
        self.problem = ""
        self.running: list[Running] = []
        self.completed: int | None = None
        """Exit status, of a pod that is not restarted."""
        self._end = threading.Event()
        self._sandbox, self.process = start_sandbox(name, self.folder / "sandbox.log")
        self.address: IPv4Address = network.join(self.process)
        self._hosts = network.hosts
        self._volumes = Volumes(self.spec.get("volumes", []), objects, self.folder / "volumes")
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)

    def start(self) -> Pod:
        self._thread.start()
        return self

    @property
    def is_alive(self) -> bool:
        return self._sandbox.poll() is None

    @property
    def is_ready(self) -> bool:
        wanted = len(self.spec["containers"])
        return self.is_alive and len(self.running) == wanted and all(each.is_ready() for each in self.running)

    def container(self, name: str) -> Container:
        """A running container, by name. Raises RatchetError."""
        for each in self.running:
            if each.spec["name"] == name:
                return each.container
        raise RatchetError(f"pod {self.name} runs no container {name}.", f"Its logs are in {self.folder}.")

    def stop(self) -> None:
        """Send SIGTERM and, after the pod's grace period, SIGKILL."""
        self._end.set()
        self._thread.join()
        for each in self.running:
            each.container.terminate()
        until = time.monotonic() + float(self.spec.get("terminationGracePeriodSeconds", 30))
        for each in self.running:
            try:
                each.container.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.problem = self.problem or f"{each.spec['name']} did not end in its grace period"
        self.kill()

    def kill(self) -> None:
        """SIGKILL all its processes at once, as when its machine is lost."""
        self._end.set()
        if self.is_alive:
            os.kill(self.process, signal.SIGKILL)
        self._sandbox.wait()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._volumes.remove()

    # -- the life of a pod

    def _live(self) -> None:
        try:
            for spec in self.spec.get("initContainers", []):
                self._initialize(spec)
            if self._end.is_set():
                return
            self.running = [Running(spec, self._start(spec)) for spec in self.spec["containers"]]
            while not self._end.wait(LOOK_SECONDS):
                for each in self.running:
                    self._look(each)
        except RatchetError as error:
            self.problem = str(error)
            progress_log.error(f"{self.name}: {error}")

    def _initialize(self, spec: Mapping[str, Any]) -> None:
        """Run an init container, which must succeed before the others start."""
        pause = RESTART_SECONDS
        while not self._end.is_set():
            container = self._start(spec)
            while container.status is None and not self._end.wait(0.1):
                pass
            if container.status == 0 or self._end.is_set():
                return
            self._note(spec, f"ended with {container.status}")
            self._end.wait(pause)
            pause = min(2 * pause, MOST_RESTART_SECONDS)

    def _look(self, one: Running) -> None:
        now = time.monotonic()
        if one.container.status is not None:
            if self.spec.get("restartPolicy") == "Never":
                self.completed = one.container.status
                self._end.set()
            elif one.restart_at is None:
                self._note(one.spec, f"ended with {one.container.status}")
                one.restart_at = now + min(RESTART_SECONDS * 2**one.restarts, MOST_RESTART_SECONDS)
            elif now >= one.restart_at:
                one.restarts, one.restart_at = one.restarts + 1, None
                one.probes = {name: ProbeState() for name in PROBES}
                one.container = self._start(one.spec)
            return
        started = one.probes["startupProbe"].passed or "startupProbe" not in one.spec
        for name in PROBES[1:] if started else PROBES[:1]:
            if name in one.spec and now >= one.probes[name].due:
                self._probe(one, name)

    def _probe(self, one: Running, name: str) -> None:
        probe, state = one.spec[name], one.probes[name]
        state.due = time.monotonic() + probe.get("periodSeconds", 10)
        if _answers(self._url(one.spec, probe["httpGet"]), probe.get("timeoutSeconds", 1)):
            state.passed, state.failures = True, 0
            return
        state.failures += 1
        if state.failures < probe.get("failureThreshold", 3):
            return
        state.passed = False
        if name != "readinessProbe" and (main := one.container.main) is not None:
            self._note(one.spec, f"its {name} failed {state.failures} times")
            main.kill()

    def _url(self, spec: Mapping[str, Any], get: Mapping[str, Any]) -> str:
        ports = {port["name"]: port["containerPort"] for port in spec.get("ports", [])}
        return f"http://{self.address}:{ports.get(get['port'], get['port'])}{get['path']}"

    def _note(self, spec: Mapping[str, Any], reason: str) -> None:
        if self._end.is_set() or not self.is_alive:  # the pod ends, which is no container's fault
            return
        self.restarts.append(f"{self.name}/{spec['name']}: {reason}")
        progress_log.warning(f"{self.restarts[-1]}")

    def _start(self, spec: Mapping[str, Any]) -> Container:
        if spec["securityContext"] != SECURITY or self.spec["securityContext"]["runAsUser"] != USER:
            raise RatchetError(f"{spec['name']} has a securityContext that is not known here.", "Add it to the runner.")
        mounts = self._volumes.mounts(spec)
        return Container(
            self.image, self.process, [Mount(self._hosts, "/etc/hosts", True), *mounts],
            command=[*spec.get("command", []), *spec.get("args", [])], environment=self._environment(spec),
            shares_processes=self.spec.get("shareProcessNamespace", False), root=self.folder / "roots" / spec["name"],
            log=self.folder / f"{spec['name']}.log",
        )  # fmt: skip

    def _environment(self, spec: Mapping[str, Any]) -> dict[str, str]:
        environment = {"HOSTNAME": self.name}
        for each in spec.get("env", []):
            if "value" in each:
                environment[each["name"]] = each["value"]
                continue
            reference = each["valueFrom"]["secretKeyRef"]
            value = self.objects.secrets.get(reference["name"], {}).get(reference["key"])
            if value is not None:
                environment[each["name"]] = value
            elif not reference.get("optional"):
                raise RatchetError(f"no key {reference['key']} in a Secret {reference['name']}.", "Make it first.")
        return environment


def _answers(url: str, seconds: float) -> bool:
    try:
        return httpx.get(url, timeout=seconds, trust_env=False).is_success
    except httpx.HTTPError:
        return False
