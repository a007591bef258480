from __future__ import annotations

from typing import Any

from ray.scripts import scripts

from benchmarks.cluster.network import HOST
from benchmarks.cluster.pod import SECURITY
from benchmarks.cluster.ray_service import RayCluster
from benchmarks.cluster.volumes import mount_points
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


def ray_words(pod: Any) -> list[str]:
    """Arguments of ``ray start`` as the container's shell gets them."""
    container = pod.container("ray")
    assert container["command"] == ["/bin/bash", "-lc", "--"]
    limits, _, start = container["args"][0].partition("; ")
    assert limits.startswith("ulimit")
    return str(start).removeprefix("ray start ").split()


def test_ray_starts_a_head_and_workers_with_the_resources_of_their_pods_and_one_token() -> None:
    (service,) = of_kind(render(profile("cpu")), "RayService")
    start: Any = PodStub
    cluster: Any = RayCluster("live-1", service["spec"]["rayClusterConfig"], start, "ml")
    cluster.keep_no_longer()
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


def test_every_container_of_the_chart_has_the_rights_that_the_runner_gives_and_its_mounts() -> None:
    templates = [template for _, template in pods(render(profile("cpu")))]
    for template in templates:
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == SECURITY
    folders, files = mount_points(templates)
    assert {"/tmp", "/dev/shm", "/var/lib/ratchet", "/run/ratchet/metrics"} <= folders
    assert files == {"/etc/ratchet/ratchet.yaml"}
