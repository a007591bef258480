"""The chart on a real cluster, installed by the administrator of a namespace where PodSecurity is ``restricted``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from core.waiting import wait_until
from tests.outside.kubernetes.cluster import NAMESPACE, RELEASE, UPGRADE_SECONDS, WORKERS, Cluster

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(4 * 3600)]
HEAD = "ray.io/node-type=head"
RECOVERY_SECONDS = 600


def allows_drains(cluster: Cluster, workers: list[int]) -> bool:
    """Wait up to a minute for the number of workers that may be drained; none where there is no budget."""

    def allowed() -> list[int]:
        budgets = json.loads(cluster.kubectl("get", "poddisruptionbudgets", "--output", "json"))["items"]
        ours = [each for each in budgets if each["metadata"]["name"] == f"{RELEASE}-serving"]
        return [each.get("status", {}).get("disruptionsAllowed", 0) for each in ours]

    return wait_until(lambda: allowed() == workers, 60, pause=2)


Told = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:

    def tell(operation: str, found: dict[str, Any]) -> None:
        with capsys.disabled():
            print(f"\n{operation}: {found['requests']} requests, {len(found['failed'])} failed")
        assert found["requests"] > 20
        assert found["failed"] == []

    return tell


def test_policies_let_a_client_reach_the_model_server_and_nothing_of_ray(cluster: Cluster) -> None:
    assert cluster.reaches(f"{RELEASE}-serve-svc", 8000)
    [head] = cluster.pods(HEAD)
    ports = {"GCS": 6379, "dashboard": 8265, "Ray client": 10001}
    assert not [name for name, port in ports.items() if cluster.reaches(head["status"]["podIP"], port)]


def test_another_number_of_workers_is_there_after_an_upgrade_and_no_request_fails(cluster: Cluster, told: Told) -> None:
    with cluster.load() as found:
        for workers in (1, 2, 4, 2):
            cluster.upgrade(f"serving.workers.replicas={workers}")
            assert len(cluster.ready()) == workers
            assert allows_drains(cluster, [1] if workers > 1 else [])
    told("replicas 1, 2, 4, 2", found)


def test_another_image_and_another_request_timeout_and_back_fail_no_request(cluster: Cluster, told: Told) -> None:
    before = cluster.active()
    with cluster.load() as found:
        cluster.upgrade("serving.requestTimeoutSeconds=61", "image.tag=next")
        images = {each["image"] for pod in cluster.pods(WORKERS) for each in pod["spec"]["containers"]}
        assert images == {"docker.io/local/ratchet:next"} and cluster.active() != before
        cluster.helm("rollback")
        cluster.replaced()
        images = {each["image"] for pod in cluster.pods(WORKERS) for each in pod["spec"]["containers"]}
        assert images == {"docker.io/local/ratchet:1"}
    told("image and settings, roll-back", found)


@pytest.mark.parametrize("lost", [WORKERS, HEAD])
def test_a_pod_of_ray_that_is_lost_is_replaced_and_no_request_fails(cluster: Cluster, told: Told, lost: str) -> None:
    pods = cluster.ready(lost)
    with cluster.load() as found:
        cluster.kubectl("delete", "pod", pods[0], "--grace-period=0", "--force")
        assert wait_until(
            lambda: len(now := cluster.ready(lost)) == len(pods) and pods[0] not in now, RECOVERY_SECONDS, pause=2
        )
        cluster.helm("test", "--timeout", "15m")
    told(f"lost pod of {lost}", found)


def test_an_upgrade_stops_at_once_where_a_secret_is_not_there(cluster: Cluster) -> None:
    done = cluster.helm("upgrade", "--set", "ledger.existingSecret.name=nothing", check=False)
    assert done.returncode and f"namespace {NAMESPACE} has no Secret nothing" in done.stderr


def test_an_install_waits_until_what_is_being_deleted_is_gone_from_redis_too_and_then_serves(cluster: Cluster) -> None:
    cluster.helm("uninstall")
    done = cluster.helm("install", check=False)
    assert done.returncode and f"RayService {RELEASE} of an earlier installation is still being deleted" in done.stderr
    cluster.kubectl("wait", "--for=delete", f"rayservice/{RELEASE}", "--timeout=10m", seconds=UPGRADE_SECONDS)
    assert cluster.keys_in_redis() == 0
    cluster.helm("install")
    cluster.helm("test", "--timeout", "15m")
