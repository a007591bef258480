from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray.scripts import scripts

from benchmarks.cluster import ray_service
from benchmarks.cluster.network import HOST
from benchmarks.cluster.pod import SECURITY
from benchmarks.cluster.ray_service import RayCluster
from benchmarks.cluster.volumes import ConfigObjects, Volumes, mount_points
from core.errors import RatchetError
from core.waiting import wait_until
from tests.support.chart import of_kind, pods, profile, render


class PodStub:
    def __init__(self, name: str, template: Any) -> None:
        self.name, self.template = name, template
        self.is_alive = self.is_ready = True
        self.address = HOST

    def container(self, name: str) -> dict[str, Any]:
        spec = self.template["spec"]
        containers = [*spec["initContainers"], *spec["containers"]]
        return next(dict(each) for each in containers if each["name"] == name)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray_service, "LOOK_SECONDS", 0.01)
    (service,) = of_kind(render(profile("cpu")), "RayService")
    start: Any = PodStub
    running = RayCluster("live-1", service["spec"]["rayClusterConfig"], start, "ml")
    yield running
    running.keep_no_longer()


def ray_words(pod: Any) -> list[str]:
    """Arguments of ``ray start`` as the container's shell gets them."""
    container = pod.container("ray")
    assert container["command"] == ["/bin/bash", "-lc", "--"]
    limits, _, start = container["args"][0].partition("; ")
    assert limits.startswith("ulimit")
    return str(start).removeprefix("ray start ").split()


def test_ray_starts_a_head_and_workers_with_the_resources_of_their_pods_and_one_token(cluster: Any) -> None:
    head = scripts.start.make_context("start", ray_words(cluster.head)).params
    assert (head["head"], head["num_cpus"], head["dashboard_host"]) == (True, 0, "0.0.0.0")
    assert len(cluster.workers) == 2
    for worker in cluster.workers:
        read = scripts.start.make_context("start", ray_words(worker)).params
        assert (read["head"], read["num_cpus"], read["block"]) == (False, 3, True)  # of 2500m
        assert read["address"] == "live-1-head-svc.ml.svc.cluster.local:6379"
        assert worker.container("wait-gcs-ready")["args"][0].startswith(
            "until ray health-check --address live-1-head-svc"
        )
    for pod in (cluster.head, *cluster.workers):
        values = {each["name"]: each.get("value") for each in pod.container("ray")["env"]}
        assert values["RAY_AUTH_MODE"] == "token" and values["RAY_AUTH_TOKEN"] == cluster.token
        assert values["RAY_SERVE_ENABLE_HA_PROXY"] == "1", "the chart's variables are kept"


def test_a_lost_worker_gets_one_successor(cluster: Any) -> None:
    lost = cluster.workers[1]
    lost.is_alive = False
    assert not cluster.is_ready()
    assert wait_until(lambda: cluster.workers[1] is not lost, 10.0, pause=0.01)
    assert cluster.is_ready()
    assert len({pod.name for pod in cluster.pods}) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="files are given to another group")
def test_a_volume_has_the_files_of_its_secret_or_config_map_for_the_pods_group_alone(tmp_path: Path) -> None:
    objects = ConfigObjects({"kafka": {"client": "{}"}}, {"live": {"ratchet.yaml": "a: 1"}})
    manifests = [{"name": "k", "secret": {"secretName": "kafka"}}, {"name": "s", "configMap": {"name": "live"}}]
    volumes = Volumes(manifests, objects, tmp_path)
    file = {"name": "s", "mountPath": "/etc/ratchet.yaml", "subPath": "ratchet.yaml", "readOnly": True}
    mounts = volumes.mounts({"volumeMounts": [file, {"name": "k", "mountPath": "/etc/kafka"}]})
    assert [(mount.path, mount.read_only) for mount in mounts] == [("/etc/ratchet.yaml", True), ("/etc/kafka", False)]
    assert mounts[0].source.read_text() == "a: 1"
    assert (mounts[1].source / "client").stat().st_mode & 0o777 == 0o440
    with pytest.raises(RatchetError, match="claim is of a kind that is not known"):
        Volumes([{"name": "claim", "persistentVolumeClaim": {}}], objects, tmp_path)


def test_every_container_of_the_chart_has_the_rights_that_the_runner_gives_and_its_mounts() -> None:
    templates = [template for _, template in pods(render(profile("cpu")))]
    for template in templates:
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == SECURITY
    folders, files = mount_points(templates)
    assert {"/tmp", "/dev/shm", "/var/lib/ratchet", "/run/ratchet/metrics"} <= folders
    assert files == {"/etc/ratchet/ratchet.yaml"}
