"""The chart on a real cluster: workers come and go under load, wrong upgrades stop, and it is installed again."""

from __future__ import annotations

import json

import pytest

from ops.waiting import wait_until
from tests.outside.kubernetes.conftest import NAMESPACE, RELEASE, UPGRADE_SECONDS, Cluster

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(4 * 3600)]


def allows_drains(cluster: Cluster, workers: list[int]) -> bool:
    """Whether so many workers may be drained, within a minute; none where there is no budget."""

    def allowed() -> list[int]:
        budgets = json.loads(cluster.kubectl("get", "poddisruptionbudgets", "--output", "json"))["items"]
        ours = [each for each in budgets if each["metadata"]["name"] == f"{RELEASE}-serving"]
        return [each.get("status", {}).get("disruptionsAllowed", 0) for each in ours]

    return wait_until(lambda: allowed() == workers, 60, pause=2)


def active_cluster(cluster: Cluster) -> str:
    """Name of the Ray cluster that clients reach."""
    path = "--output=jsonpath={.status.activeServiceStatus.rayClusterName}"
    return cluster.kubectl("get", "rayservice", RELEASE, path)


def test_another_number_of_workers_is_there_after_an_upgrade_and_no_request_fails(cluster: Cluster) -> None:
    with cluster.load() as found:
        for workers in (1, 2, 4, 2):
            cluster.upgrade(f"serving.workers.replicas={workers}")
            assert cluster.ready_workers() == workers
            assert allows_drains(cluster, [1] if workers > 1 else [])
    assert found["requests"] > 100
    assert found["failed"] == []


def test_another_request_timeout_reaches_serve(cluster: Cluster) -> None:
    before = active_cluster(cluster)
    with cluster.load() as found:
        cluster.upgrade("serving.requestTimeoutSeconds=61")
    assert active_cluster(cluster) != before
    assert found["failed"] == []


def test_an_upgrade_stops_at_once_where_a_secret_is_not_there(cluster: Cluster) -> None:
    done = cluster.helm("upgrade", "--set", "ledger.existingSecret.name=nothing", check=False)
    assert done.returncode and f"namespace {NAMESPACE} has no Secret nothing" in done.stderr


def test_an_install_waits_for_what_is_being_deleted_and_then_serves(cluster: Cluster) -> None:
    cluster.helm("uninstall")
    done = cluster.helm("install", check=False)
    assert done.returncode and f"RayService {RELEASE} of an earlier installation is still being deleted" in done.stderr
    cluster.kubectl("wait", "--for=delete", f"rayservice/{RELEASE}", "--timeout=10m", seconds=UPGRADE_SECONDS)
    cluster.helm("install")
    cluster.helm("test", "--timeout", "15m")
