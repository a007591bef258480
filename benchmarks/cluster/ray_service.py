"""KubeRay's handling of a RayService: clusters of pods, Serve's configuration, services, and upgrades.

After ``ray-operator/controllers/ray`` of ray-project/kuberay at v1.7.0: ``common/pod.go`` (commands and variables),
``common/service.go`` (names) and ``rayservice_controller.go`` (a change of the compared part of ``rayClusterConfig``
makes a second cluster, which serves before the first one is removed; ``serveConfigV2`` alone goes to the running
cluster; numbers of workers and tolerations alone are ignored).
"""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

import httpx
import yaml

from benchmarks.cluster.pod import Pod
from core.errors import RatchetError
from core.progress import progress_log
from core.waiting import wait_until

GCS_PORT: Final = 6379
DASHBOARD_PORT: Final = 8265
MADE_BY_OPERATOR: Final = {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
LOOK_SECONDS: Final = 2.0
DELETION_SECONDS: Final = 60.0
"""Of a replaced cluster: RayClusterDeletionDelaySeconds."""
START_SECONDS: Final = 1200.0
UNITS: Final = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

StartPod = Callable[[str, Mapping[str, Any]], Pod]


class RayCluster:
    """A head and its workers. Lost workers are replaced."""

    def __init__(self, name: str, spec: Mapping[str, Any], start_pod: StartPod, namespace: str) -> None:
        self.name, self.spec, self.namespace = name, spec, namespace
        self.token = secrets.token_urlsafe(32) if spec.get("authOptions", {}).get("mode") == "token" else ""
        self.applied = ""
        self._start_pod = start_pod
        self._end = threading.Event()
        self._made = 0
        self.head = self._start(spec["headGroupSpec"], head=True)
        self.workers = [self._start(group) for group in self._groups()]
        self._thread = threading.Thread(target=self._replace, name=name, daemon=True)
        self._thread.start()

    @property
    def head_service(self) -> str:
        return f"{self.name}-head-svc"

    @property
    def pods(self) -> list[Pod]:
        return [pod for pod in (self.head, *self.workers) if pod.is_alive]

    def is_ready(self) -> bool:
        return all(pod.is_alive and pod.is_ready for pod in (self.head, *self.workers))

    def apply(self, configuration: str) -> None:
        """Give Serve's controller its configuration; retries until the head accepts it."""
        if self.applied == configuration:
            return
        body = yaml.safe_load(configuration)
        with suppress(httpx.HTTPError):
            answer = httpx.put(self._url("/api/serve/applications/"), json=body, headers=self._headers(), timeout=30)
            if answer.is_success:
                self.applied = configuration

    def is_serving(self) -> bool:
        with suppress(httpx.HTTPError, KeyError, ValueError):
            answer = httpx.get(self._url("/api/serve/applications/"), headers=self._headers(), timeout=10)
            states = [each["status"] for each in answer.json()["applications"].values()]
            return bool(self.applied and states) and all(state == "RUNNING" for state in states)
        return False

    def keep_no_longer(self) -> None:
        """Replace no lost pods from now on."""
        self._end.set()
        self._thread.join()

    def stop(self) -> None:
        """End all pods together, as deleting a RayCluster does: each has its grace period."""
        self.keep_no_longer()
        with ThreadPoolExecutor(len(self.workers) + 1) as pool:
            list(pool.map(lambda pod: pod.stop(), self.pods))

    def _groups(self) -> list[Mapping[str, Any]]:
        return [group for group in self.spec["workerGroupSpecs"] for _ in range(group["replicas"])]

    def _replace(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            for number, group in enumerate(self._groups()):
                if not self.workers[number].is_alive:
                    self.workers[number] = self._start(group)

    def _start(self, group: Mapping[str, Any], head: bool = False) -> Pod:
        self._made += 1
        kind = "head" if head else f"{group['groupName']}-worker"
        return self._start_pod(f"{self.name}-{kind}-{self._made}", self._template(group, head))

    def _template(self, group: Mapping[str, Any], head: bool) -> Mapping[str, Any]:
        template: dict[str, Any] = json.loads(json.dumps(group["template"]))
        ray = template["spec"]["containers"][0]
        service = f"{self.head_service}.{self.namespace}.svc.cluster.local"
        address = f"127.0.0.1:{GCS_PORT}" if head else f"{service}:{GCS_PORT}"
        added = {
            "RAY_CLUSTER_NAME": self.name, "RAY_CLUSTER_NAMESPACE": self.namespace, "RAY_PORT": str(GCS_PORT),
            "RAY_ADDRESS": address, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1", "RAY_SERVE_KV_TIMEOUT_S": "5",
            "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO": "0", "RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS": "5",
            **({} if head else {"FQ_RAY_IP": service, "RAY_IP": self.head_service}),
            **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}),
        }  # fmt: skip
        names = {each["name"] for each in ray["env"]}
        ray["env"] += [{"name": name, "value": value} for name, value in added.items() if name not in names]
        words = " ".join(f"--{name}={value}" for name, value in _parameters(group, ray, address, head).items())
        role = "--head " if head else ""
        ray["command"] = ["/bin/bash", "-lc", "--"]
        ray["args"] = [f"ulimit -n 65536; ray start {role}--block {words}"]
        if not head:
            template["spec"]["initContainers"].insert(0, _wait_for_head(ray, address))
        return template

    def _url(self, path: str) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}{path}"

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}


class RayService:
    """The clusters of a RayService: one that clients reach and, during an upgrade, a second one."""

    def __init__(self, start_pod: StartPod, namespace: str) -> None:
        self._start_pod, self._namespace = start_pod, namespace
        self.active: RayCluster | None = None
        self.pending: RayCluster | None = None
        self._retired: list[threading.Thread] = []

    @property
    def serving(self) -> RayCluster:
        """The cluster that clients reach. Raises RatchetError when there is none."""
        if self.active is None:
            raise RatchetError("no cluster serves.", "Look at the pods' logs.")
        return self.active

    @property
    def clusters(self) -> list[RayCluster]:
        return [cluster for cluster in (self.active, self.pending) if cluster is not None]

    def apply(self, resource: Mapping[str, Any], switched: Callable[[], None]) -> str:
        """Apply the object and return when it serves: ``NewCluster``, or ``InPlace``. ``switched``: called when
        services name the new cluster, before the old one is removed. Raises RatchetError if it does not serve in time.
        """
        spec = resource["spec"]
        cluster = spec["rayClusterConfig"]
        if self.active is not None and compared_by_kuberay(self.active.spec) == compared_by_kuberay(cluster):
            self.active.applied = ""
            self._serve(self.active, spec["serveConfigV2"])
            return "InPlace"
        name = f"{resource['metadata']['name']}-{secrets.token_hex(3)[:5]}"
        self.pending = RayCluster(name, cluster, self._start_pod, self._namespace)
        self._serve(self.pending, spec["serveConfigV2"])
        old, self.active, self.pending = self.active, self.pending, None
        switched()
        if old is not None:
            self._retired.append(threading.Thread(target=_retire, args=(old,), daemon=True))
            self._retired[-1].start()
        return "NewCluster"

    def wait_for_retired(self) -> None:
        for thread in self._retired:
            thread.join()

    def _serve(self, cluster: RayCluster, configuration: str) -> None:
        def serves() -> bool:
            cluster.apply(configuration)
            return cluster.is_serving() and cluster.is_ready()

        began = time.monotonic()
        if not wait_until(serves, START_SECONDS, pause=LOOK_SECONDS):
            raise RatchetError(f"{cluster.name} does not serve after {START_SECONDS:.0f} s.", "Look at its pods' logs.")
        progress_log.info(f"{cluster.name} serves after {time.monotonic() - began:.0f} s")


def compared_by_kuberay(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a ``rayClusterConfig`` whose change makes KubeRay start a second cluster.

    After ``GenerateHashWithoutReplicasAndWorkersToDelete`` in ``utils/util.go`` at v1.6.2; earlier versions compare
    tolerations as well.
    """
    compared: dict[str, Any] = json.loads(json.dumps(spec))
    compared.pop("upgradeStrategy", None)
    for group in [compared["headGroupSpec"], *compared["workerGroupSpecs"]]:
        for number in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(number, None)
        group["template"]["spec"].pop("tolerations", None)
    return compared


def _retire(cluster: RayCluster) -> None:
    time.sleep(DELETION_SECONDS)
    cluster.stop()


def _parameters(group: Mapping[str, Any], ray: Mapping[str, Any], address: str, head: bool) -> dict[str, str]:
    """Parameters of ``ray start``: the group's, plus missing resources."""
    limits = ray["resources"].get("limits", {})
    sizes = {**ray["resources"].get("requests", {}), **limits}
    missing = {**MADE_BY_OPERATOR, "num-cpus": str(math.ceil(quantity(sizes["cpu"])))}
    if "memory" in limits:
        missing["memory"] = str(int(quantity(limits["memory"])))
    if not head:
        missing["address"] = address
    return {**missing, **group["rayStartParams"]}


def quantity(text: str) -> float:
    """Parse a Kubernetes quantity: ``500m``, ``4``, ``10Gi``."""
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    return float(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else float(text)


def _wait_for_head(ray: Mapping[str, Any], address: str) -> dict[str, Any]:
    check = f"until ray health-check --address {address} > /dev/null 2>&1; do sleep 5; done"
    return {**ray, "name": "wait-gcs-ready", "command": ["/bin/bash", "-lc", "--"], "args": [check]}
