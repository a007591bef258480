"""KubeRay accepts the RayService: its schemas and the rules of its own code, in the versions that the docs name.

The rules are those of ``ray-operator/controllers/ray`` in ray-project/kuberay, read at the tags v1.5.0, v1.5.1, v1.6.2
and v1.7.0: ``utils/validation.go`` (ValidateRayServiceMetadata, ValidateRayServiceSpec, ValidateRayClusterSpec),
``utils/constant.go`` (names and ports), ``common/service.go`` (BuildServeService) and ``common/pod.go``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import HelmError
from jsonschema import Draft202012Validator
from ray.serve._private import constants

from benchmarks.cluster.ray_service import compared_by_kuberay
from core.settings import Settings
from serving.ray import ray_session
from tests.support import chart
from tests.support.chart import EVERYTHING, ROOT, cluster_groups, named, of_kind, profile, render

VERSIONS = {"1.5.1": "RayService-1.5.1.json", "1.6.2": "RayService-1.6.2.json", "1.7": "RayService.json"}
REFUSED = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
"""ValidateRayClusterSpec rejects a head with one of them together with GcsFaultToleranceOptions."""
MANAGED = {
    "FQ_RAY_IP", "RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME",
    "KUBERAY_GEN_RAY_START_CMD", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_PORT",
}  # fmt: skip
"""setContainerEnvVars and SetContainerTokenAuthEnvVars add these."""
DEPLOYER = (ROOT / "docs" / "deployer" / "install.md").read_text()


@pytest.fixture(scope="module")
def training() -> list[dict[str, Any]]:
    workers = {"enabled": True, "gpus": 1, "maxReplicas": 8, "tolerations": [{"operator": "Exists"}]}
    return render(profile("multigpu"), EVERYTHING, {"updater": {"workers": workers}})


@pytest.fixture
def cluster(training: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = of_kind(training, "RayCluster")
    return found


def ray_service(*layers: Any) -> dict[str, Any]:
    (found,) = of_kind(render(*layers), "RayService")
    return found


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    """RayContainerIndex is 0: the first container is Ray's, whatever its name."""
    first: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return first


def ports(group: dict[str, Any]) -> dict[str, int]:
    found = {port["name"]: port["containerPort"] for port in ray_container(group)["ports"]}
    assert len(set(found.values())) == len(found)
    return found


@cache
def schema(file: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((ROOT / "tests" / "support" / "crds" / file).read_text()))


def test_each_version_knows_every_field_and_the_first_one_without_a_token(service: dict[str, Any]) -> None:
    for file in VERSIONS.values():
        schema(file).validate(service)
    of_first = schema("RayService-1.5.0.json")
    assert [each for each in of_first.iter_errors(ray_service(EVERYTHING)) if "authOptions" in each.message]
    without = ray_service(EVERYTHING, {"serving": {"rayAuth": "disabled"}})
    of_first.validate(without)
    assert "authOptions" not in without["spec"]["rayClusterConfig"]
    assert "operator 1.5.1 to 1.7; 1.5.0 with `serving.rayAuth: disabled`" in DEPLOYER


def test_its_name_is_a_label_that_is_short_enough(service: dict[str, Any]) -> None:
    """ValidateRayServiceMetadata; MaxRayServiceNameLength is a cluster's 53, less what KubeRay appends."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    longest = render({"fullnameOverride": "a" * 40})
    assert all(len(each["metadata"]["name"]) <= 63 for each in longest)
    assert len(of_kind(longest, "RayService")[0]["metadata"]["name"]) <= 53 - len("-xxxxx")
    for refused in ("2nd", "v1.2"):
        with pytest.raises(HelmError, match=rf"{refused}-ratchet cannot be the name .* Set fullnameOverride"):
            render(name=refused)
        assert render({"fullnameOverride": "second"}, name=refused)


def test_its_variables_are_those_that_ray_reads_and_none_that_kuberay_refuses_or_sets(
    service: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy has as much time to get ready, and a message as many bytes, as on one machine."""
    environ: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environ)
        ray_session.prepare_environment(Settings(home=tmp_path))
    source = inspect.getsource(constants)
    for group in cluster_groups(service):
        told = chart.variables(ray_container(group))
        assert len(told) == len(ray_container(group)["env"]) and not told.keys() & (REFUSED | MANAGED)
        assert [name for name in told if name.startswith("RAY_SERVE_") and f'"{name}"' not in source] == []
        for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"):
            assert told[name] == environ[name]
        assert float(told["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) > constants.RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S


def test_what_the_api_server_would_fill_in_is_said(service: dict[str, Any], cluster: dict[str, Any]) -> None:
    """Defaults of KubeRay's definitions, in lists that are compared as a whole: Argo CD would see a difference, and
    applying the same objects again would conflict. Workers have both bounds also where nothing scales them.
    """
    for owner in (service, cluster):
        groups = cluster_groups(owner)
        assert {group["numOfHosts"] for group in groups[1:]} == {1}
        containers = [each for group in groups for each in group["template"]["spec"]["containers"]]
        assert {port["protocol"] for each in containers for port in each.get("ports", [])} == {"TCP"}
    spec = service["spec"]["rayClusterConfig"]
    assert spec["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in spec
    for group in spec["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert spec["authOptions"] == {"mode": "token"}  # RayService has no enableK8sTokenAuth
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    assert spec["rayVersion"] == importlib.metadata.version("ray"), "the one in the image"
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "None")
    assert "upgradeStrategy" not in spec  # ValidateRayClusterUpgradeOptions


def test_ray_adds_workers_where_more_are_allowed() -> None:
    """DefaultHeadPodTemplate puts the autoscaler next to the head, which must have access to the Kubernetes API."""
    serve = {"encoder_replicas": 2, "encoder_max_replicas": 12}
    resources = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "3Gi"}}
    serving = {"workers": {"replicas": 2, "maxReplicas": 6}, "autoscaler": {"resources": resources}}
    objects = render(profile("cpu"), EVERYTHING, {"settings": {"serve": serve}, "serving": serving})
    (service,), (training,) = of_kind(objects, "RayService"), of_kind(objects, "RayCluster")
    for file in VERSIONS.values():
        schema(file).validate(service)
    cluster = service["spec"]["rayClusterConfig"]
    head, workers = cluster_groups(service)
    assert cluster["enableInTreeAutoscaling"] is True
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (2, 2, 6)
    autoscaler = cluster["autoscalerOptions"]
    assert autoscaler["image"] == ray_container(head)["image"] and autoscaler["idleTimeoutSeconds"] == 600
    assert autoscaler["resources"] == training["spec"]["autoscalerOptions"]["resources"] == resources
    assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["name"] for mount in autoscaler["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in head["template"]["spec"]["volumes"]} and "tmp" in mounted
    tokens = [group["template"]["spec"]["automountServiceAccountToken"] for group in (head, workers)]
    assert tokens == [True, False]
    deployments = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    encoder = next(each for each in deployments if each["name"] == "Encoder")
    assert encoder["max_replicas_per_node"] == 2  # 12 on 6


def test_what_kuberay_and_serve_would_not_change_in_a_running_cluster_makes_a_new_one() -> None:
    """KubeRay compares neither numbers of workers nor tolerations, and Serve reads HTTP options only when it starts."""
    autoscaled = {"serving": {"workers": {"replicas": 2, "maxReplicas": 8}}}
    before = ray_service(autoscaled)["spec"]
    anywhere = {"tolerations": [{"operator": "Exists"}]}
    for change in (
        {"workers": {"replicas": 4}}, {"workers": {"maxReplicas": 9}}, {"requestTimeoutSeconds": 60},
        {"workers": anywhere}, {"head": anywhere},
    ):  # fmt: skip
        after = ray_service(autoscaled, {"serving": change})["spec"]
        assert compared_by_kuberay(before["rayClusterConfig"]) != compared_by_kuberay(after["rayClusterConfig"]), change
    served = ray_service(autoscaled, {"serving": {"actors": {"encoder": {"cpus": 0.25}}}})["spec"]
    assert before["serveConfigV2"] != served["serveConfigV2"]
    assert before["rayClusterConfig"] == served["rayClusterConfig"], "Serve changes it in the running cluster"


def test_what_kuberay_would_add_to_a_pod_is_there_already(service: dict[str, Any]) -> None:
    """It adds probes that call wget, which the image lacks, and shared memory of the size of all memory if there is
    none; it replaces command and arguments by ``ray start``. validateRayGroupResources and validateRayGroupLabels;
    generateRayStartCommand takes CPUs from the requests.
    """
    units = {"Mi": 2**20, "Gi": 2**30}
    for group in cluster_groups(service):
        container, spec, parameters = ray_container(group), group["template"]["spec"], group["rayStartParams"]
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        assert not {"command", "args"} & container.keys()
        assert not [name for name in group["template"]["metadata"]["labels"] if name.startswith("ray.io/")]
        assert "wait-gcs-ready" not in [each["name"] for each in spec["initContainers"]]
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
        shm = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
        size = int(shm["sizeLimit"][:-2]) * units[shm["sizeLimit"][-2:]]
        assert shm["medium"] == "Memory" and size >= int(parameters["object-store-memory"])
        assert all(isinstance(value, str) for value in parameters.values())
        assert not {"labels", "redis-password", "redis-username"} & parameters.keys()
        assert not {"resources", "labels"} & group.keys()
        resources = container["resources"]
        assert "num-cpus" in parameters or {**resources["requests"], **resources["limits"]}.get("cpu")


# The cluster that trains


def test_the_cluster_that_trains_begins_without_workers(
    training: list[dict[str, Any]], cluster: dict[str, Any]
) -> None:
    spec = cluster["spec"]
    for version in ("1.6.2", "1.7"):  # with its upgradeStrategy; a RayService has the same specification inside
        whole: Any = schema(VERSIONS[version]).schema
        Draft202012Validator(whole["properties"]["spec"]["properties"]["rayClusterConfig"]).validate(spec)
    assert "1.6 to 1.7 for `updater.workers`" in DEPLOYER
    assert spec["upgradeStrategy"] == {"type": "Recreate"}, "steps would continue with the old code otherwise"
    head, workers = cluster_groups(cluster)
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (0, 0, 8)
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["idleTimeoutSeconds"] == 300
    assert ray_container(workers)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in ray_container(head)["resources"]["limits"]
    assert {"gcs-server": 6379, "dashboard": 8265, "client": 10001}.items() <= ports(head).items()
    trainer = named(training, "Deployment", "updater")["spec"]["template"]["spec"]
    for pod in (trainer, head["template"]["spec"], workers["template"]["spec"]):  # all see the updater's home
        home = next(volume for volume in pod["volumes"] if volume["name"] == "home")
        assert home["persistentVolumeClaim"]["claimName"] == "updater"
        places = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert places.items() >= {m["name"]: m["mountPath"] for m in trainer["containers"][0]["volumeMounts"]}.items()
    assert not of_kind(render(), "RayCluster")
    with pytest.raises(HelmError, match=r"updater\.storage\.existingClaim"):
        render({"updater": {"workers": {"enabled": True}}})


def test_the_updater_finds_the_cluster_and_its_token(training: list[dict[str, Any]], cluster: dict[str, Any]) -> None:
    settings = Settings.model_validate(yaml.safe_load(chart.settings_text(training)))
    assert settings.updater.ray_address == f"ray://{cluster['metadata']['name']}-head-svc:10001"
    (container,) = named(training, "Deployment", "updater")["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each for each in container["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    into = named(training, "NetworkPolicy", "training")["spec"]["ingress"][1]
    assert into["ports"] == [{"protocol": "TCP", "port": 10001}]
    assert into["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "updater"
    assert named(training, "NetworkPolicy", "updater")["spec"]["egress"][-1]["ports"] == into["ports"]
