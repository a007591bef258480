"""An installation of the chart: what Helm, Kubernetes and KubeRay do with its objects, as processes."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from benchmarks.cluster.image import Image
from benchmarks.cluster.network import Network
from benchmarks.cluster.pod import Pod
from benchmarks.cluster.ray_service import RayService
from benchmarks.cluster.volumes import ConfigObjects, mount_points
from core.errors import RatchetError
from core.progress import progress_log, step
from core.waiting import wait_until
from tests.support.chart import Object, of_kind, pods

NAMES_SECONDS: Final = 0.5
START_SECONDS: Final = 300.0


class Kubernetes:
    """One namespace. ``names``: hosts outside of it."""

    def __init__(
        self, folder: Path, namespace: str, network: Network, secrets: Mapping[str, Mapping[str, str]],
        names: Mapping[str, IPv4Address],
    ) -> None:  # fmt: skip
        self.folder, self.namespace, self.network, self.secrets, self.names = folder, namespace, network, secrets, names
        self.image = Image(folder / "image")
        self.objects: Sequence[Object] = ()
        self._objects = ConfigObjects(secrets, {})
        self._deployed: dict[str, tuple[str, list[Pod]]] = {}
        self.ray = RayService(self._pod, namespace)
        self._numbers = itertools.count(1)
        self._pods: list[Pod] = []
        self._end = threading.Event()
        self._naming = threading.Thread(target=self._name, daemon=True)
        self._naming.start()

    def install(self, objects: Sequence[Object], switched: Callable[[], None] = lambda: None) -> str:
        """Install or upgrade: the migration first, then all else. Returns how serving was changed.

        ``switched`` is called when services name another Ray cluster, before the old one is removed. Raises
        RatchetError when a part does not get ready.
        """
        self.image.make_mount_points(*mount_points([template for _, template in pods(objects)]))
        maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}
        self._objects = ConfigObjects(self.secrets, maps)
        for job in of_kind(objects, "Job"):
            with step("migration"):
                self.run(job["metadata"]["name"], job["spec"]["template"])
        self.objects = objects

        def switch() -> None:
            self._name_once()
            switched()

        with ThreadPoolExecutor() as pool:
            deployed = [pool.submit(self._deploy, each) for each in of_kind(objects, "Deployment")]
            (service,) = of_kind(objects, "RayService")
            with step("RayService"):
                how = self.ray.apply(service, switch)
            for each in deployed:
                each.result()
        return how

    def run(self, name: str, template: Mapping[str, Any], seconds: float = START_SECONDS) -> str:
        """Run a pod to completion and return its output. Raises RatchetError when it fails."""
        pod = self._pod(f"{name}-{next(self._numbers)}", template)
        container = pod.spec["containers"][0]["name"]
        wait_until(lambda: pod.completed is not None or pod.problem, seconds, pause=0.2)
        log = pod.folder / f"{container}.log"
        pod.kill()
        if pod.completed != 0:
            output = log.read_text()[-2000:] if log.exists() else pod.problem
            raise RatchetError(f"{pod.name} ended with {pod.completed}: {output}", f"See {pod.folder}.")
        return log.read_text()

    def pod(self, component: str) -> Pod:
        """The pod of a Deployment. Raises RatchetError."""
        for each in self._live():
            if each.labels.get("app.kubernetes.io/component") == component:
                return each
        raise RatchetError(f"no pod is of component {component}.", "Is it enabled in the values?")

    def all_restarts(self) -> list[str]:
        return [text for pod in self._pods for text in pod.restarts]

    def problems(self) -> list[str]:
        return [f"{pod.name}: {pod.problem}" for pod in self._pods if pod.problem]

    def stop(self) -> None:
        self._end.set()
        self._naming.join()
        for cluster in self.ray.clusters:
            cluster.keep_no_longer()
        for pod in self._live():
            pod.kill()

    def _deploy(self, deployment: Object) -> None:
        """The old pods end before new ones start (Recreate, or a surge of 0). Returns when the new ones are ready."""
        name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
        text = json.dumps(template, sort_keys=True)
        before, old = self._deployed.get(name, ("", []))
        if before == text:
            return
        for pod in old:
            pod.stop()
        new = [
            self._pod(f"{name}-{next(self._numbers)}", template) for _ in range(deployment["spec"].get("replicas", 1))
        ]
        self._deployed[name] = text, new
        if not wait_until(lambda: all(pod.is_ready for pod in new), START_SECONDS, pause=0.5):
            raise RatchetError(f"{name} is not ready after {START_SECONDS:.0f} s.", f"See {new[0].folder}.")
        progress_log.info(f"{name} is ready")

    def _pod(self, name: str, template: Mapping[str, Any]) -> Pod:
        pod = Pod(
            name, template, image=self.image, network=self.network, objects=self._objects, folder=self.folder / "pods"
        )
        self._pods.append(pod)
        return pod.start()

    def _live(self) -> list[Pod]:
        return [pod for pod in self._pods if pod.is_alive]

    # -- services

    def _name(self) -> None:
        while not self._end.wait(NAMES_SECONDS):
            self._name_once()

    def _name_once(self) -> None:
        services: dict[str, list[IPv4Address]] = {name: [address] for name, address in self.names.items()}
        services |= {pod.name: [pod.address] for pod in self._live()}  # a kubelet names a pod in its own file alone
        for cluster in self.ray.clusters:
            services |= self._named(cluster.head_service, [cluster.head])  # it publishes those that are not ready, too
        for service in of_kind(self.objects, "Service"):
            selector = service["spec"]["selector"].items()
            chosen = [pod for pod in self._live() if pod.is_ready and selector <= pod.labels.items()]
            services |= self._named(service["metadata"]["name"], chosen)
        for service in of_kind(self.objects, "RayService"):
            name = service["metadata"]["name"]
            if self.ray.active is not None:
                ready = [pod for pod in self.ray.active.workers if pod.is_alive and pod.is_ready]
                services |= self._named(f"{name}-serve-svc", ready)
                services |= self._named(f"{name}-head-svc", [self.ray.active.head])
        self.network.name(services)

    def _named(self, name: str, chosen: Sequence[Pod]) -> dict[str, list[IPv4Address]]:
        addresses = [pod.address for pod in chosen]
        return dict.fromkeys((name, f"{name}.{self.namespace}.svc.cluster.local"), addresses)
